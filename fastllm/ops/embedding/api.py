"""The public function: checks, schema, fake, and which backends serve."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import Backend
from ...errors import dtype_error, shape_error, type_error
from ...quant.tensor import QuantizedTensor
from .. import _check, _op, _triton
from . import native, reference


def _prepare(ids: Tensor, w: QuantizedTensor, *, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    _check_ids(ids, dtype)
    if not isinstance(w, QuantizedTensor):
        raise type_error("embedding", "w", w, "a QuantizedTensor or a torch.Tensor")
    if w.data.device != ids.device:
        raise ValueError(f"embedding: w is on {w.data.device}, expected {ids.device} to match ids")
    return ids, w.data, w.scale, w.minimum, *w.shape, w.bits, w.group_size, w.zero, w.layout, dtype


def _check_ids(ids: Any, dtype: torch.dtype) -> None:
    _check.tensor("embedding", "ids", ids)
    if ids.dtype not in (torch.int64, torch.int32):
        raise dtype_error("embedding", "ids", ids.dtype, "torch.int64 or torch.int32")
    if dtype not in _check.FLOATS:
        raise dtype_error("embedding", "dtype", dtype, "torch.float32, torch.bfloat16 or torch.float16")


def _reference(
    ids: Tensor,
    data: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    zero: int,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    w = QuantizedTensor(data, scale, minimum, zero, (n, k), bits, group_size, layout)
    return reference.embedding(ids, w, dtype=dtype)


def _fake(ids: Tensor, data: Tensor, *form: Any) -> Tensor:
    k, dtype = form[3], form[-1]
    return data.new_empty((*ids.shape, k), dtype=dtype)


_quantised = _op.Op(
    "embedding",
    "(Tensor ids, Tensor data, Tensor scale, Tensor? minimum, SymInt n, SymInt k, int bits, int group_size, int zero, "
    "str layout, ScalarType dtype) -> Tensor",
    fake=_fake,
    backends=(
        Backend("cpu", native.embedding, native.refuse),
        _triton.backend(__package__, "embedding"),
        Backend("reference", _reference, _check.never_refuse),
    ),
    prepare=_prepare,
    no_gradient="the table holds integers",
)


def embedding(ids: Tensor, w: QuantizedTensor | Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of a table, dequantised as they are read.

    y[..., k] = w[ids[...], k]

    Args:
        ids: any shape, int64 or int32, from 0 to N - 1.
        w: (N, K), quantised (kernels read layout "x16"), or an ordinary tensor, which PyTorch's own embedding serves.
        dtype: of the result: fp32|bf16|fp16.

    Returns:
        (..., K) of ``dtype``.

    Raises:
        TypeError: ids that are no integers, another dtype. ValueError: an id outside of the table, before anything is written;
        on a GPU, where asking would wait for it, and in Triton's interpreter, which does what the GPU does, such a row is NaN.

    Numerics: integer times scale plus minimum in fp32, rounded once to ``dtype``. No gradient to a quantised table.
    Cost: K bits / 8 bytes of weights read and K values written for each id.
    Source: the input embedding of every transformer; the real model stores its own in Q8_0, shared with the head.
    """
    if isinstance(w, Tensor):
        _check_ids(ids, dtype)
        if w.dim() != 2:
            raise shape_error("embedding", "w", w.shape, "(N, K)")
        if ids.is_cuda:  # reading an id would wait for the GPU, and PyTorch's own check ends the process
            known = ((ids >= 0) & (ids < w.shape[0])).unsqueeze(-1)
            y = torch.nn.functional.embedding(ids.clamp(0, w.shape[0] - 1), w).to(dtype)
            return y.masked_fill(~known, float("nan"))
        if torch.compiler.is_compiling():  # the range check reads values, which a graph has not got
            return torch.nn.functional.embedding(ids, w).to(dtype)
        return reference.embedding(ids, w, dtype=dtype)
    return _quantised(*_prepare(ids, w, dtype=dtype))
