"""Weights -> QuantizedTensor, and rows of a KV cache -> int8, by rounding to the nearest step."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm.errors import dtype_error, shape_error, type_error, value_error
from fastllm.quant.tensor import GROUP_SIZES, QuantizedTensor, store_integers

__all__ = ["quantize", "quantize_rows"]

CHUNK = 1 << 22  # weights rounded at a time: bounds the fp32 temporaries to some tens of MB
CLIP_RATIOS = tuple(1.0 - 0.025 * step for step in range(17))  # 1.0 down to 0.6: what "search" tries for each group
TINY = 2.0**-100  # a row, or a group of quant_matmul's activations, below this counts as zero: 127 / amax must be finite
MAX_END_ERROR = 0.125  # of a step: how far rounding the scale and minimum to fp16 may move an end of the range


def quantize(
    weight: Tensor,
    bits: int = 4,
    group_size: int | None = 64,
    *,
    symmetric: bool | None = None,
    method: str = "nearest",
    importance: Tensor | None = None,
) -> QuantizedTensor:
    """Quantise a weight matrix to 4 or 8 bits, one scale for each ``group_size`` columns of a row.

    Formula: asymmetric ``scale = (max - min) / (2^bits - 1), minimum = min, zero = 0``; symmetric
    ``scale = max|w| / (2^(bits-1) - 1), zero = 2^(bits-1)``; then
    ``q = clamp(round((w - minimum) / scale) + zero, 0, 2^bits - 1)``.

    Args:
        weight: (N, K) fp32|bf16|fp16, finite.
        bits: 4 or 8.
        group_size: 32, 64 or 128, dividing K; -1 or None for the whole row.
        symmetric: no minimum, zero in the middle. Default: True for 8 bits, False for 4.
        method: "nearest" spans the whole range of a group; "search" also tries narrower ranges and keeps for each group
            the one with the least squared error.
        importance: (K,) fp32, not negative: weight of each column's squared error in "search", e.g. the mean square of
            the activation that it multiplies. Default: all columns alike.

    Returns: a QuantizedTensor in layout "rows".
    Raises: TypeError for a non-tensor or a dtype; ValueError for bits, group_size, method, rank, an empty weight, or one
    that holds inf or nan.
    Numerics: fp32. Scale and minimum are rounded to the dtype in which they are stored before the integers are chosen:
    fp16, or fp32 for the whole tensor where fp16 would move the end of a group's range by over 1/8 step. Deterministic.
    Cost: reads the weight twice (19 times for "search").
    """
    op = "quantize"
    group_size = _check(op, weight, bits, group_size, method, importance)
    if symmetric is None:
        symmetric = bits == 8
    n, k = weight.shape
    grouped = weight.detach().reshape(n, k // group_size, group_size)
    low, high = (bound.to(torch.float32) for bound in torch.aminmax(grouped, dim=-1))
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise value_error(op, "weight", "partly inf or nan", "finite values")
    top = (1 << bits) - 1
    zero = 1 << (bits - 1) if symmetric else 0
    scale, minimum = _range(low, high, 1.0, bits, symmetric=symmetric)
    dtype = torch.float16
    if not _fits_fp16(low, high, scale, minimum, bits):
        dtype = torch.float32
    scale = scale.to(dtype)
    minimum = None if minimum is None else minimum.to(dtype)
    data = weight.new_empty((n, k if bits == 8 else -(-k // 2)), dtype=torch.uint8)
    rows = max(1, CHUNK // k)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        w = grouped[part].to(torch.float32)
        s, m = scale[part], None if minimum is None else minimum[part]
        if method == "search":
            _search(w, low[part], high[part], s, m, bits, zero, importance)
        q = _integers(w, s, m, zero, top)
        data[part] = store_integers(q.to(torch.uint8).view(q.shape[0], k), bits)
    return QuantizedTensor.make(data, scale, minimum, zero=zero, shape=(n, k), bits=bits, group_size=group_size)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys or values for an int8 cache: 8 bits an element, one scale a row, as ``fastllm.attention`` reads them.

    Formula: ``scale = max|x| / 127, q = round(x / scale)`` over the last dim, ties to even.

    Args:
        x: (..., D) fp32|bf16|fp16; of a cache (B, Hk, S, D), where a row is one head's token.

    Returns: q (..., D) int8 and scale (...) fp32; q * scale is within half a step of x.
    Raises: TypeError for a non-tensor or a dtype; ValueError where D is 0 or there is no dim.
    Numerics: fp32. A row that holds an infinity or a NaN gets the scale NaN, so that whoever sees it notices. No gradient.
    Cost: reads x twice.
    """
    if not isinstance(x, Tensor):
        raise type_error("quantize_rows", "x", x, "a torch.Tensor")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise dtype_error("quantize_rows", "x", x.dtype, "torch.float32, torch.bfloat16 or torch.float16")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise shape_error("quantize_rows", "x", x.shape, "(..., D) with D of at least 1")
    rows = x.detach().float()
    amax = rows.abs().amax(-1)
    usable = amax.isfinite() & (amax >= TINY)
    steps = torch.full_like(amax, 127.0)  # a tensor: PyTorch turns number / tensor into number * (1 / tensor)
    inverse = torch.where(usable, steps / amax, 0.0)
    q = torch.where(usable[..., None], (rows * inverse[..., None]).round(), 0.0).to(torch.int8)
    return q, torch.where(usable, amax / steps, torch.where(amax.isfinite(), 0.0, torch.nan))


def _check(op: str, weight: Tensor, bits: int, group_size: int | None, method: str, importance: Tensor | None) -> int:
    """Refuse what cannot be quantised; returns the group size in columns."""
    if not isinstance(weight, Tensor):
        raise type_error(op, "weight", weight, "a torch.Tensor")
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise dtype_error(op, "weight", weight.dtype, "float32, float16 or bfloat16")
    if weight.ndim != 2 or weight.numel() == 0:
        raise shape_error(op, "weight", weight.shape, "(N, K), both above 0")
    if bits not in (4, 8):
        raise value_error(op, "bits", bits, "4 or 8")
    k = weight.shape[1]
    if group_size is None or group_size == -1:
        group_size = k
    if group_size != k and (group_size not in GROUP_SIZES or k % group_size):
        raise value_error(op, "group_size", group_size, f"32, 64, 128 or -1, dividing K = {k}")
    if method not in ("nearest", "search"):
        raise value_error(op, "method", method, "'nearest' or 'search'")
    if importance is not None:
        if not isinstance(importance, Tensor):
            raise type_error(op, "importance", importance, "a torch.Tensor")
        if method != "search":
            raise value_error(op, "importance", "given", "None", "only method='search' weighs its errors")
        if tuple(importance.shape) != (k,):
            raise shape_error(op, "importance", importance.shape, f"({k},)", "one value a column of weight")
        if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
            raise value_error(op, "importance", "partly negative, inf or nan", "finite values of at least 0")
    return group_size


def _range(low: Tensor, high: Tensor, ratio: float, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Scale and minimum, fp32, for the middle ``ratio`` of the range of each group."""
    if symmetric:
        return torch.maximum(high, -low) * (ratio / ((1 << (bits - 1)) - 1)), None
    steps = (1 << bits) - 1
    scale = high / steps - low / steps  # divided first: high - low may overflow
    cut = scale * (steps * (1.0 - ratio) / 2)
    return scale * ratio, low + cut


def _fits_fp16(low: Tensor, high: Tensor, scale: Tensor, minimum: Tensor | None, bits: int) -> bool:
    """Whether rounding scale and minimum to fp16 moves no end of a group's range by more than MAX_END_ERROR steps.

    A group of one repeated value has no step: there fp16's own rounding of the value is accepted.
    """
    half = scale.to(torch.float16).to(torch.float32)
    if minimum is None:
        reach = (1 << (bits - 1)) - 1
        error = (half * reach - torch.maximum(high, -low)).abs()
    else:
        start = minimum.to(torch.float16).to(torch.float32)
        end = start + half * ((1 << bits) - 1)
        error = torch.maximum((start - low).abs(), (end - high).abs())
    allowed = torch.where(scale > 0, scale * MAX_END_ERROR, low.abs() * 2**-11)
    return bool((error <= allowed).all())  # false for inf and nan, so for an overflow too


def _integers(w: Tensor, scale: Tensor, minimum: Tensor | None, zero: int, top: int) -> Tensor:
    """q (n, G, group) as fp32, from the scale and minimum as they are stored."""
    divisor = scale.to(torch.float32).unsqueeze(-1)
    divisor = torch.where(divisor > 0, divisor, 1.0)
    q = w - minimum.to(torch.float32).unsqueeze(-1) if minimum is not None else w.clone()
    return q.div_(divisor).round_().add_(zero).clamp_(0, top)


def _search(
    w: Tensor,
    low: Tensor,
    high: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bits: int,
    zero: int,
    importance: Tensor | None,
) -> None:
    """Overwrite scale and minimum with those of the clipping ratio that has the least squared error."""
    top = (1 << bits) - 1
    best = torch.full_like(low, torch.inf)
    column_weight = 1.0 if importance is None else importance.to(w).view(1, *w.shape[1:])
    for ratio in CLIP_RATIOS:
        s, m = _range(low, high, ratio, bits, symmetric=minimum is None)
        s = s.to(scale.dtype)
        m = None if m is None else m.to(scale.dtype)
        restored = _integers(w, s, m, zero, top).sub_(zero).mul_(s.to(torch.float32).unsqueeze(-1))
        if m is not None:
            restored.add_(m.to(torch.float32).unsqueeze(-1))
        error = (restored.sub_(w).square_() * column_weight).sum(dim=-1)
        better = error < best
        best = torch.where(better, error, best)
        scale.copy_(torch.where(better, s, scale))
        if m is not None and minimum is not None:
            minimum.copy_(torch.where(better, m, minimum))
