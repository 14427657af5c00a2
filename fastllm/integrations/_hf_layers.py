"""Forwards for the modules of transformers' Llama-type models, and the source that each of them stands for.

A forward here replaces a module's own only on that module, and only if the module's class has, word for word (comments, annotations
and defaults aside), the forward below in ``KNOWN``. Another release of transformers that means something else by the same name keeps
its own forward.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..ops import apply_rotary, gated_activation, rms_norm
from ..ops._check import FLOATS

# ---------------------------------------------------------------- what the forwards stand for

_ATTENTION = """
def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs):
    input_shape = hidden_states.shape[:-1]
    hidden_shape = (*input_shape, -1, self.head_dim)
    query_states = {query}.transpose(1, 2)
    key_states = {key}.transpose(1, 2)
    value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
    cos, sin = position_embeddings
    query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
    if past_key_values is not None:
        key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)
    attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
    attn_output, attn_weights = attention_interface(
        self, query_states, key_states, value_states, attention_mask,
        dropout=0.0 if not self.training else self.attention_dropout, scaling=self.scaling, {window} **kwargs)
    attn_output = attn_output.reshape(*input_shape, -1).contiguous()
    attn_output = self.o_proj(attn_output)
    return attn_output, attn_weights
"""
_PLAIN = {"query": "self.q_proj(hidden_states).view(hidden_shape)", "key": "self.k_proj(hidden_states).view(hidden_shape)"}
_NORMED = {name: f"self.{name[0]}_norm({text})" for name, text in _PLAIN.items()}
_MODULE_WINDOW = "sliding_window=self.sliding_window,"

KNOWN = {
    "rms_norm": """
def forward(self, hidden_states):
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)
""",
    "mlp": """
def forward(self, x):
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj
""",
    "llama": _ATTENTION.format(window="", **_PLAIN),
    "mistral": _ATTENTION.format(window="sliding_window=getattr(self.config, 'sliding_window', None),", **_PLAIN),
    "qwen2": _ATTENTION.format(window=_MODULE_WINDOW, **_PLAIN),
    "qwen3": _ATTENTION.format(window=_MODULE_WINDOW, **_NORMED),
    "apply_rotary_pos_emb": """
def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed
""",
    "rotate_half": """
def rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)
""",
}


def differs(function: Callable[..., Any], known: str) -> str | None:
    """Why ``function`` is not the one in KNOWN, or None if it is."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return f"the source of its {known} cannot be read"
    if _bare(source) != _bare(KNOWN[known]):
        import transformers

        name = getattr(function, "__qualname__", known)
        return f"transformers {transformers.__version__}'s {name} is not the one that fastllm knows"
    return None


class _Bare(ast.NodeTransformer):
    """Drops what does not change the meaning of a function that is called by keyword: annotations, defaults, docstrings."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns, node.args.defaults, node.args.kw_defaults = None, [], []
        # transformers' own mark for "a kernel may stand here"
        node.decorator_list = [d for d in node.decorator_list if "use_kernel_forward_from_hub" not in ast.unparse(d)]
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        return node if node.value is None else ast.Assign([node.target], node.value)


def _bare(source: str) -> str:
    return ast.dump(_Bare().visit(ast.parse(source)))


# ---------------------------------------------------------------- the forwards

# Each takes the module first and is set on it as ``partial(forward, module, ...)``: unlike a bound method that pickles, deep-copies
# with its module and compiles without a graph break. Each leaves to plain PyTorch what the op does not take: float64, and
# the mixed dtypes of autocast or of fp32 norm weights in a bf16 model.


def rms_norm_forward(module: Any, hidden_states: Tensor) -> Tensor:
    if hidden_states.dtype != module.weight.dtype or hidden_states.dtype not in FLOATS:
        return type(module).forward(module, hidden_states)
    return rms_norm(hidden_states, module.weight, module.variance_epsilon)


def mlp_forward(module: Any, x: Tensor, *, activation: str) -> Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    if gate.dtype != up.dtype or gate.dtype not in FLOATS:
        return module.down_proj(module.act_fn(gate) * up)
    return module.down_proj(gated_activation(gate, up, activation=activation))


def attention_forward(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    *,
    rotary: Callable[..., tuple[Tensor, Tensor]],
    eager: Callable[..., tuple[Tensor, Tensor | None]],
    kind: str,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """The forward of ``LlamaAttention`` and its kin with ``fastllm.apply_rotary`` in it.

    rotary and eager are the modeling file's ``apply_rotary_pos_emb`` and ``eager_attention_forward``; kind is the model's type.
    """
    tokens = hidden_states.shape[:-1]
    heads = (*tokens, -1, module.head_dim)
    query, key = module.q_proj(hidden_states).view(heads), module.k_proj(hidden_states).view(heads)
    if kind == "qwen3":
        query, key = module.q_norm(query), module.k_norm(key)
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    value = module.v_proj(hidden_states).view(heads).transpose(1, 2)
    cos, sin = position_embeddings
    served = query.dtype == key.dtype == cos.dtype == sin.dtype and query.dtype in FLOATS
    query, key = (apply_rotary if served else rotary)(query, key, cos, sin)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, module.layer_idx)
    if kind in ("qwen2", "qwen3"):
        others["sliding_window"] = module.sliding_window
    elif kind == "mistral":
        others["sliding_window"] = getattr(module.config, "sliding_window", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
    dropout = module.attention_dropout if module.training else 0.0
    out, weights = attend(module, query, key, value, attention_mask, dropout=dropout, scaling=module.scaling, **others)
    return module.o_proj(out.reshape(*tokens, -1).contiguous()), weights


def modeling_global(module: nn.Module, name: str) -> Any:
    """A name in the file that defines the module's class."""
    return type(module).forward.__globals__[name]  # type: ignore[attr-defined]
