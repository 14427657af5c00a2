"""``fastllm.accelerate``: fastllm's kernels inside a loaded transformers model, and back out of it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..backends import forced_backend
from ..errors import type_error, value_error
from ..ops._check import FLOATS
from ..ops._explain import ops_reached
from ..pages import HugePages
from ..quant import quantize
from .quant_linear import QuantLinear

__all__ = ["Left", "Report", "Swap", "accelerate"]

OP = "accelerate"
MODEL_TYPES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}  # config.model_type: class prefix
BITS = {"int4": 4, "int8": 8}
# int4 in small groups, because the group is what its accuracy hangs on; int8 barely feels it.
DEFAULT_GROUP = {"int4": 32, "int8": 128}
GROUP_SIZES = (128, 64, 32)
_ABSENT = object()


# ---------------------------------------------------------------- the report


@dataclass(frozen=True)
class Swap:
    """One thing that fastllm now does: the kind ("rms_norm", "linear", ...), the module's name, what serves it."""

    kind: str
    module: str
    by: str


@dataclass(frozen=True)
class Left:
    """One thing that was left as it was, and why."""

    module: str
    what: str
    why: str


@dataclass
class _Change:
    """An attribute of a module: what it was and what it becomes."""

    owner: nn.Module
    where: str  # the owner's name, for sentences
    name: str
    before: Any
    after: Any

    def now(self) -> Any:
        return self.owner.__dict__.get(self.name, self.owner._modules.get(self.name, _ABSENT))

    def apply(self) -> None:
        setattr(self.owner, self.name, self.after)

    def revert(self) -> None:
        if self.before is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.before)


@dataclass
class Report:
    """What ``accelerate`` did to a model; ``str()`` is the text that it prints.

    Attributes:
        model: the model's class name.
        swapped: what fastllm does now, a row for each module.
        left: what was left as it was, and why.
        notes: what else the user should know.
        active: False once ``undo()`` has run.
    """

    model: str
    swapped: list[Swap] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    active: bool = True
    _changes: list[_Change] = field(default_factory=list, repr=False)
    _config: _OwnConfig | None = field(default=None, repr=False)
    _lost: int = field(default=0, repr=False)

    @property
    def counts(self) -> dict[str, int]:
        """How many modules of each kind were swapped."""
        return dict(Counter(swap.kind for swap in self.swapped))

    def undo(self) -> None:
        """Restore the model: its forwards, attention setting, config object and Linear layers. Again: nothing happens.

        Settings changed on ``model.config`` since are kept.

        Raises: RuntimeError, with nothing restored, if the float weights were not kept (``keep_originals=False``) or if
        someone has replaced since what ``accelerate`` put in.
        """
        if not self.active:
            return
        if self._lost:
            raise RuntimeError(
                f"undo: the float weights of {self._lost} Linear layers are gone, expected keep_originals=True, because only "
                "they restore the model; load it again"
            )
        for change in self._changes:
            if change.now() is not change.after:
                raise RuntimeError(
                    f"undo: {change.where or 'the model'}.{change.name} was replaced after accelerate, expected what accelerate "
                    "put there; undo that replacement first"
                )
        for change in reversed(self._changes):
            change.revert()
        if self._config is not None:
            self._config.hand_back()
        self._changes.clear()
        self.active = False

    def __str__(self) -> str:
        lines = [f"fastllm.accelerate: {self.model}" + ("" if self.active else " (undone)")]
        for (kind, by), count in Counter((swap.kind, swap.by) for swap in self.swapped).items():
            lines.append(f"  swapped {count:>4} {kind:<10} {by}")
        if not self.swapped:
            lines.append("  swapped nothing")
        for (what, why), count in Counter((left.what, left.why) for left in self.left).items():
            lines.append(f"  left    {count:>4} {what:<10} {why}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


class _OwnConfig:
    """A config object of the model's own, because models that were made from one config share it, attention setting included."""

    def __init__(self, model: Any) -> None:
        self.theirs = model.config
        self.ours = copy.copy(model.config)
        self.at_first = dict(self.ours.__dict__)

    def changes(self, model: nn.Module) -> Iterator[_Change]:
        for name, module in model.named_modules():
            if module.__dict__.get("config") is self.theirs:
                yield _Change(module, name, "config", self.theirs, self.ours)

    def hand_back(self) -> None:
        """Carry over the settings that the user changed meanwhile, e.g. ``model.config.use_cache``."""
        for name, value in self.ours.__dict__.items():
            if name != "_attn_implementation_internal" and self.at_first.get(name, _ABSENT) is not value:
                self.theirs.__dict__[name] = value


# ---------------------------------------------------------------- the public function


def accelerate(
    model: Any,
    *,
    weights: str | None = None,
    group_size: int | None = None,
    activations: str = "float",
    head: bool = False,
    keep_originals: bool = True,
    verbose: bool = True,
) -> Report:
    """Let fastllm's kernels do the work inside a loaded transformers model of the Llama type, in place.

    The model stays the same object with the same parameters and ``state_dict``; ``generate``, caches and ``torch.compile`` work
    as before. Attention goes through transformers' registry (``attn_implementation="fastllm"``), norms, rotary and gated MLPs
    through a forward on each module, as transformers' kernel mapping does it, and only where the module's class is the one that
    fastllm knows. No class and no other model changes. What is left as it was, the report lists with the reason.

    Args:
        model: a ``transformers.PreTrainedModel``: Llama (SmolLM2, TinyLlama), Mistral, Qwen2 or Qwen3, fp32|bf16|fp16. Any other
            type is left as it is, and the report says so.
        weights: None leaves Linear layers alone; "int8" or "int4" quantises them by rounding (``fastllm.quantize``).
        group_size: 32, 64 or 128 columns share a scale; None: 32 for int4, 128 for int8. A Linear whose K it does not divide gets
            the largest smaller one that does; the report says which.
        activations: "float", or "int8": how quantised layers see their input (``quant_matmul``).
        head: quantise the output head too. It is the largest matrix of a small model, and the one whose error is seen
            directly in the logits. A head that shares its weight with the embedding gets a quantised copy.
        keep_originals: the report keeps the float Linear layers, so that ``undo()`` can put them back. They are freed with
            the report, or at once with False: ``undo()`` then refuses.
        verbose: print the report.

    Returns:
        A Report: ``swapped``, ``left``, ``counts``, ``str()``, and ``undo()``, which restores the model exactly.

    Raises:
        TypeError: no PreTrainedModel. ValueError: an option; a model that is accelerated already, quantised by another
        library, or has no data (meta device). NotImplementedError: a device that fastllm has no kernels for. ImportError:
        transformers is not installed. In all cases the model is as it was.

    Numerics: each kernel is within the tolerance rule of PyTorch's own op (docs/numerics.md); in fp32 greedy decoding gives the
        same tokens but for near ties. "int8" and "int4" change the weights: that loss is the format's.
    Gradients: norm, rotary and MLP have their own; where attention wants one, PyTorch's attention serves, whose backward is fused. A
        quantised Linear passes the gradient on to its input, its weight does not train.
    Cost: nothing without ``weights``. With it, reads each Linear twice, and adds 5/8 (int4) or 9/8 (int8) byte a weight, at most;
        float weights that nothing else holds go when the report goes.
    Source: transformers' attention interface and kernel mapping; Touvron et al. 2023, arXiv:2302.13971.
    """
    pretrained = _pretrained_model_class()
    if not isinstance(model, pretrained):
        hint = "its _orig_mod, before torch.compile" if hasattr(model, "_orig_mod") else ""
        raise type_error(OP, "model", model, "a transformers.PreTrainedModel", hint and f"({hint})")
    _check_options(weights, group_size, activations)
    _check_model(model)
    report = Report(type(model).__name__)
    plan = _Plan(model, report)
    if plan.is_llama_type():
        plan.layers()
        plan.attention()
        if weights is not None:
            plan.linears(weights, group_size or DEFAULT_GROUP[weights], activations, head)
        plan.leave_the_rest(weights)
        _apply(report, keep_originals)
    if verbose:
        print(report)
    return report


def _pretrained_model_class() -> type[nn.Module]:
    try:
        from transformers import PreTrainedModel
    except ImportError as error:
        raise ImportError(
            f"{OP}: transformers could not be imported ({error}); install it with `pip install fastllm[transformers]`"
        ) from error
    return PreTrainedModel


def _check_options(weights: Any, group_size: Any, activations: Any) -> None:
    if weights is not None and weights not in BITS:
        raise value_error(OP, "weights", weights, "None, 'int8' or 'int4'")
    if group_size is not None and group_size not in GROUP_SIZES:
        raise value_error(OP, "group_size", group_size, "None, 32, 64 or 128")
    if activations not in ("float", "int8"):
        raise value_error(OP, "activations", activations, "'float' or 'int8'")
    if weights is None and (group_size is not None or activations != "float"):
        arg, got = ("group_size", group_size) if group_size is not None else ("activations", activations)
        raise value_error(OP, arg, got, "nothing", "without weights='int8' or 'int4', which it belongs to")


def _check_model(model: nn.Module) -> None:
    """Refuse a model that can't be touched safely, in words, before anything is."""
    for name, module in model.named_modules():
        if _is_ours(module):
            because = f"({name or type(module).__name__} is fastllm's); call undo() of its report first"
            raise value_error(OP, "model", "accelerated", "a model that is not", because)
    config: Any = model.config
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None or getattr(model, "hf_quantizer", None) is not None:
        get = quantization.get if isinstance(quantization, dict) else partial(getattr, quantization)
        method = str(getattr(get("quant_method", None), "value", get("quant_method", None)))
        raise value_error(OP, "model", f"quantised by {method}", "float weights", "load it without quantization_config")
    devices: dict[str, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        devices.setdefault(tensor.device.type, name)
    if "meta" in devices:
        because = "because a meta tensor has no data; load the weights first, and without offloading"
        raise value_error(OP, "device", f"meta (of {devices['meta']})", "a model with data", because)
    for device, name in devices.items():
        why = _no_kernel("rms_norm", torch.empty(1, 8, device=device), None)
        if why is not None:
            raise NotImplementedError(f"{OP}: model is on {device} ({name}), expected the CPU, because {why}")


def _is_ours(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    made_here = isinstance(forward, partial) and getattr(forward.func, "__module__", "").startswith(__package__)
    return made_here or isinstance(module, QuantLinear)


def _no_kernel(op: str, *args: Any, **kwargs: Any) -> str | None:
    """Why only the plain PyTorch reference could serve this call, or None: asked of the op itself, nothing is computed."""
    try:
        reached = ops_reached(getattr(ops, op), args, kwargs)
    except (TypeError, ValueError, NotImplementedError) as error:
        return str(error)
    for registered, prepared in reached:
        rows = registered.explain(prepared)
        served = next((backend for backend, serves, _ in rows if serves), None)
        if served is None or (served == "reference" and forced_backend() != "reference"):
            return "; ".join(f"{backend}: {why}" for backend, _, why in rows if backend != "reference") or f"{op} has no kernel"
    return None


# ---------------------------------------------------------------- what to change


class _Plan:
    """Goes through a model, notes in the report what to swap and what to leave. Changes nothing."""

    def __init__(self, model: Any, report: Report) -> None:
        self.model, self.report = model, report
        self.config = model.config
        self.kind: str = getattr(model.config, "model_type", "") or ""
        self.prefix = MODEL_TYPES.get(self.kind, "")
        self.handled: set[str] = set()  # modules that are swapped, or whose reason is noted
        self.compared: dict[tuple[Any, str], str | None] = {}

    def is_llama_type(self) -> bool:
        if self.prefix:
            return True
        known = ", ".join(MODEL_TYPES)
        for name, module in self.model.named_modules():
            if name and not list(module.children()):
                why = f"model_type {self.kind!r} is none of those that fastllm knows ({known})"
                self.report.left.append(Left(name, type(module).__name__, why))
        return False

    def swap(self, kind: str, name: str, by: str, change: _Change | None = None) -> None:
        self.handled.add(name)
        self.report.swapped.append(Swap(kind, name, by))
        if change is not None:
            self.report._changes.append(change)

    def leave(self, name: str, what: str, why: str) -> None:
        self.handled.add(name)
        self.report.left.append(Left(name, what, why))

    def forward(self, kind: str, name: str, module: nn.Module, by: str, forward: Callable[..., Any]) -> None:
        self.swap(kind, name, by, _Change(module, name, "forward", _ABSENT, forward))

    def layers(self) -> None:
        """Norms, gated MLPs and rotary: a forward on the module."""
        from . import _hf_layers as layers

        for name, module in self.model.named_modules():
            what = type(module).__name__.removeprefix(self.prefix)
            if type(module).__name__ == what:
                continue
            if what == "RMSNorm":
                why = self._foreign(module) or self._differs(type(module).forward, "rms_norm")
                why = why or _no_kernel("rms_norm", _probe(module.weight, 1, module.weight.shape[0]), module.weight)
                if why is None:
                    self.forward("rms_norm", name, module, "fastllm.rms_norm", partial(layers.rms_norm_forward, module))
            elif what == "MLP":
                activation = _activation(module)
                why = self._foreign(module) or self._differs(type(module).forward, "mlp")
                if why is None and not activation:
                    why = f"its activation {type(module.act_fn).__name__} is neither silu nor tanh-gelu"
                probe = _probe(next(module.parameters()), 1, 64)
                why = why or _no_kernel("gated_activation", probe, probe, activation=activation)
                if why is None:
                    by = "fastllm.gated_activation between its Linear layers"
                    self.forward("gated_mlp", name, module, by, partial(layers.mlp_forward, module, activation=activation))
                self.handled.add(f"{name}.act_fn")
            elif what == "Attention":
                why = self._foreign(module) or self._rotary_differs(layers, module)
                if why is None:
                    by = "fastllm.apply_rotary in the attention layer's forward"
                    originals = {
                        "rotary": layers.modeling_global(module, "apply_rotary_pos_emb"),
                        "eager": layers.modeling_global(module, "eager_attention_forward"),
                    }
                    forward = partial(layers.attention_forward, module, kind=self.kind, **originals)
                    self.forward("rotary", name, module, by, forward)
            else:
                continue
            if why is not None:
                self.leave(name, "rotary" if what == "Attention" else type(module).__name__, why)

    def _rotary_differs(self, layers: Any, module: Any) -> str | None:
        why = self._differs(type(module).forward, self.kind)
        for known in ("apply_rotary_pos_emb", "rotate_half"):
            why = why or self._differs(layers.modeling_global(module, known), known)
        if why is not None:
            return why
        q = _probe(module.q_proj.weight, 1, 1, 2, module.head_dim).transpose(1, 2)
        table = _probe(module.q_proj.weight, 1, 1, module.head_dim)
        return _no_kernel("apply_rotary", q, q, table, table)

    def _differs(self, function: Any, known: str) -> str | None:
        """``_hf_layers.differs``, once for each class rather than for each module."""
        from ._hf_layers import differs

        if (function, known) not in self.compared:
            self.compared[function, known] = differs(function, known)
        return self.compared[function, known]

    def _foreign(self, module: Any) -> str | None:
        """Why this module, whose class name fits, is not transformers' own with its own forward, or None."""
        if not type(module).__module__.startswith("transformers.models."):
            return f"it comes from {type(module).__module__}, not from transformers"
        if "forward" in module.__dict__:
            return "another library has put a forward of its own on it"
        return None

    def attention(self) -> None:
        """Attention: transformers' registry, through the setting in a config of this model's own."""
        layers = [(n, m) for n, m in self.model.named_modules() if type(m).__name__ == f"{self.prefix}Attention"]
        try:
            from . import _hf_attention

            why = _hf_attention.unknown()
        except ImportError as error:
            why = f"this transformers has no attention and mask registry that fastllm knows ({error})"
        if why is None and not type(self.model)._can_set_attn_implementation():
            why = f"transformers says that {type(self.model).__name__} cannot change its attention"
        for _, module in layers:
            q = _probe(module.q_proj.weight, 1, 1, 1, module.head_dim)
            why = why or _no_kernel("attention", q, q, q, causal=True, scale=module.scaling)
        if why is not None:
            for name, _ in layers:
                self.report.left.append(Left(name, "attention", why))
            return
        _hf_attention.register()
        own = _OwnConfig(self.model)
        own.ours._attn_implementation_internal = _hf_attention.NAME
        self.report._config = own
        self.report._changes += own.changes(self.model)
        for name, _ in layers:
            self.swap("attention", name, f'fastllm.attention, as attn_implementation="{_hf_attention.NAME}"')
        self.report.notes.append(
            "where a gradient is wanted, as in a training step or a forward outside of torch.no_grad(), and under dropout, "
            "PyTorch's attention serves"
        )

    def linears(self, weights: str, group_size: int, activations: str, head: bool) -> None:
        """Linear layers: a QuantLinear in each one's place."""
        output, memory = self.model.get_output_embeddings(), HugePages()
        for name, module in self.model.named_modules():
            if type(module) is not nn.Linear:
                continue
            if module is output and not head:
                self.leave(name, "Linear", "the output head stays float, unless head=True asks for it")
                continue
            why = self._unfit(module)
            if why is not None:
                self.leave(name, "Linear", why)
                continue
            K = module.in_features
            group = next((g for g in GROUP_SIZES if g <= group_size and K % g == 0), None)
            if group is None:
                self.leave(name, "Linear", f"its K = {K} is not divisible by 32, the smallest group")
                continue
            by = f"fastllm.quant_matmul, {weights} in groups of {group}, {activations} activations"
            if group != group_size:
                by += f" (K = {K} is not divisible by {group_size})"
            try:
                weight = quantize(module.weight, BITS[weights], group)
            except ValueError as error:  # inf or nan in it
                self.leave(name, "Linear", str(error))
                continue
            if weight.data.is_cpu:
                weight = weight.pack(memory)
            quantised = QuantLinear(weight, module.bias, activations=activations).train(module.training)
            why = _no_kernel("quant_matmul", _probe(module.weight, 1, K), quantised.quantized, activations=activations)
            if why is not None:
                self.leave(name, "Linear", why)
                continue
            parent, _, child = name.rpartition(".")
            self.swap("linear", name, by, _Change(self.model.get_submodule(parent), parent, child, module, quantised))
        if "linear" in self.report.counts:
            self.report.notes.append(
                f"{weights} Linear layers pass gradients to their inputs but do not train, and state_dict() refuses them"
            )

    def _unfit(self, module: Any) -> str | None:
        if "forward" in module.__dict__:
            return "another library has put a forward of its own on it"
        if nn.utils.parametrize.is_parametrized(module):
            return "its weight is parametrised"
        if module.weight.dtype not in FLOATS:
            return f"its weight is {module.weight.dtype}, quantize takes float32, bfloat16 and float16"
        return None

    def leave_the_rest(self, weights: str | None) -> None:
        for name, module in self.model.named_modules():
            what = type(module).__name__
            if name in self.handled or (list(module.children()) and what != f"{self.prefix}RotaryEmbedding"):
                continue
            if type(module) is nn.Linear:
                why = "weights=None leaves Linear layers to PyTorch"
            elif what.endswith("RotaryEmbedding"):
                why = "it makes the cos and sin tables, once a pass"
            else:
                why = "fastllm has no op for it"
            self.leave(name, what, why)


def _probe(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _activation(module: Any) -> str:
    """The op's name for the MLP's activation, or nothing."""
    from transformers.activations import ACT2FN

    for name, ours in (("silu", "silu"), ("swish", "silu"), ("gelu_pytorch_tanh", "gelu_tanh")):
        if type(module.act_fn) is type(ACT2FN[name]):
            return ours
    return ""


# ---------------------------------------------------------------- the change itself


def _apply(report: Report, keep_originals: bool) -> None:
    """All of the report's changes, or none."""
    done: list[_Change] = []
    try:
        for change in report._changes:
            done.append(change)
            change.apply()
    except BaseException:
        for change in reversed(done):
            if change.now() is change.after:
                change.revert()
        raise
    if not keep_originals:
        for change in report._changes:
            if isinstance(change.after, QuantLinear):
                change.before = None
                report._lost += 1
