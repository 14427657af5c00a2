"""Rotary in CUDA C++: allocates the outputs, calls fastllm._cuda."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...backends import cuda_module
from .. import _op
from .native import empty_like, refuse_lanes

_cuda: Any = cuda_module()

MAX_D = 512  # kMaxRotaryD of csrc/cuda/rotary.h


def _refuse_wide(q: Tensor) -> str | None:
    return f"it turns heads of up to {MAX_D}, not {q.shape[-1]}" if q.shape[-1] > MAX_D else None


def refuse(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: object) -> str | None:
    return _op.refuse_unless_cuda(q, k, cos, sin) or refuse_lanes(q=q, k=k, cos=cos, sin=sin) or _refuse_wide(q)


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    q_out, k_out = empty_like(q), empty_like(k)
    _cuda.apply_rotary(q, k, cos, sin, q_out, k_out, interleaved)
    return q_out, k_out


def refuse_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    slots: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor | None,
    *_: object,
) -> str | None:
    return (
        _op.refuse_unless_cuda(q, k, v, cos, sin, k_cache, v_cache, positions, slots, k_scale, v_scale, block_table)
        or refuse_lanes(q=q, k=k, v=v, cos=cos, sin=sin, k_cache=k_cache, v_cache=v_cache)
        or _refuse_wide(q)
    )


def apply_rotary_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    slots: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor | None,
    interleaved: bool,
) -> Tensor:
    """Positions and slots are read on the device: one outside of its table turns q into NaN and writes nothing to the cache."""
    q_out = empty_like(q)
    caches = k_cache, v_cache, positions, slots, k_scale, v_scale, block_table
    _cuda.apply_rotary_cache(q, k, v, cos, sin, q_out, *caches, interleaved)
    _op.note_write(k_cache, v_cache, *(() if k_scale is None or v_scale is None else (k_scale, v_scale)))
    return q_out
