"""Rotary position embedding in plain PyTorch (Su et al., 2021, https://arxiv.org/abs/2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...quant import quantize_rows


def rotate(x: Tensor, interleaved: bool) -> Tensor:
    """Each pair (a, b) of lanes becomes (-b, a)."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def _apply(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    cos, sin = cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1)  # (B or 1, 1, T, R)
    turned, rest = x[..., : cos.shape[-1]].to(wide), x[..., cos.shape[-1] :]
    turned = turned * cos + rotate(turned, interleaved) * sin
    return torch.cat((turned.to(x.dtype), rest), -1)


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    return _apply(q, cos, sin, interleaved), _apply(k, cos, sin, interleaved)


def apply_rotary_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    *,
    slots: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    block_table: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    positions = torch.atleast_2d(positions)  # (B or 1, T)
    name, slots = ("positions", positions) if slots is None else ("slots", torch.atleast_2d(slots))
    if cos.dim() == 2:
        _check_range("positions", positions, cos.shape[0], "cos")
    page = k_cache.shape[2]
    rows = page if block_table is None else page * block_table.shape[1]
    _check_range(name, slots, rows, "k_cache" if block_table is None else "block_table's pages")
    batch = torch.arange(k.shape[0], device=k.device).unsqueeze(1)
    if block_table is not None:
        batch, slots = block_table[batch, slots // page].long(), slots % page
        _check_range("block_table", batch, k_cache.shape[0], "k_cache")
    if cos.dim() == 2:
        cos, sin = cos[positions], sin[positions]
    q, k = apply_rotary(q, k, cos, sin, interleaved=interleaved)
    # Indices around a slice put the indexed dims first: (B, T, Hk, D).
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        x = x.transpose(1, 2)
        if scale is not None:
            x, steps = quantize_rows(x.float() if x.dtype == torch.float64 else x)
            scale[batch, :, slots] = steps.to(scale.dtype)
        cache[batch, :, slots] = x.to(cache.dtype)
    return q


def _check_range(name: str, index: Tensor, limit: int, what: str) -> None:
    bad = (index < 0) | (index >= limit)
    if bool(bad.any()):
        _, token = bad.nonzero()[0].tolist()
        raise ValueError(
            f"apply_rotary_cache: {name} holds {int(index[bad][0])} for token {token}, "
            f"expected 0 to {limit - 1}, the rows of {what}"
        )
