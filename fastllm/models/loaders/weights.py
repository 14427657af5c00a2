"""Which tensors a model needs, and a mapping that reads them one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from fastllm.errors import shape_error, value_error
from fastllm.models.loaders.config import ModelConfig, brief
from fastllm.quant.tensor import QuantizedTensor

__all__ = ["TensorMap", "check_shapes", "expected_shapes", "missing_file"]


class TensorMap(Mapping[str, "Tensor | QuantizedTensor"]):
    """Hugging Face tensor name -> tensor, read from the file at each access; nothing is kept.

    ``shapes`` has the shape of every tensor, without reading any.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], read: Callable[[str, int, int], Tensor | QuantizedTensor]) -> None:
        self.shapes = shapes
        self._read = read

    def __getitem__(self, name: str) -> Tensor | QuantizedTensor:
        return self.rows(name, 0, self.shapes[name][0])

    def rows(self, name: str, start: int, stop: int) -> Tensor | QuantizedTensor:
        """Rows ``start`` to ``stop`` of a tensor alone (elements of a vector): so much is read, and no more."""
        rows = self.shapes[name][0]
        if not 0 <= start < stop <= rows:
            raise value_error("read_checkpoint", f"rows of {name}", (start, stop), f"0 <= start < stop <= {rows}")
        return self._read(name, start, stop)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __repr__(self) -> str:
        return f"TensorMap({len(self.shapes)} tensors)"


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model, in the order in which a forward pass reads them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        for name, out in (("q", q), ("k", kv), ("v", kv)):
            shapes[prefix + f"self_attn.{name}_proj.weight"] = (out, hidden)
            if config.qkv_bias:
                shapes[prefix + f"self_attn.{name}_proj.bias"] = (out,)
        if config.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (config.head_dim,)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, q)
        if config.o_bias:
            shapes[prefix + "self_attn.o_proj.bias"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        for name, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            shapes[prefix + f"mlp.{name}_proj.weight"] = (rows, columns)
            if config.mlp_bias:
                shapes[prefix + f"mlp.{name}_proj.bias"] = (rows,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def check_shapes(
    path: Path, expected: dict[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], spoken: Mapping[str, str]
) -> None:
    """Compare what a checkpoint holds with what its config asks for.

    ``spoken`` gives a tensor's name in the file where it differs from its Hugging Face name. A tensor that the model has
    no place for is refused: leaving it out would change what the model computes.
    """
    op = "read_checkpoint"
    for name, shape in expected.items():
        said = spoken.get(name, name)
        if name not in found:
            raise value_error(op, f"{said} in {path}", "missing", f"a tensor {shape}", "the config asks for it")
        if found[name] != shape:
            raise shape_error(op, f"{said} in {path}", found[name], str(shape), "to match the config")
    for name in found:
        if name not in expected:
            raise value_error(
                op, f"a tensor in {path}", brief(spoken.get(name, name)), "only tensors that the config describes"
            )


def missing_file(what: str, path: Path, because: str = "") -> FileNotFoundError:
    """A file that the checkpoint should have."""
    tail = f" {because}" if because else ""
    return FileNotFoundError(f"read_checkpoint: {what} is missing, expected the file {path}{tail}")
