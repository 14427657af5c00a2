"""Rotary on the CPU: allocates the outputs, calls fastllm._cpu."""

from __future__ import annotations

from typing import Any

from torch import Tensor, get_num_threads

from ...backends import cpu_module
from .. import _op

_cpu: Any = cpu_module()

MAX_INT8_D = 512  # kMaxInt8Row of csrc/cpu/rotary.h


def empty_like(x: Tensor) -> Tensor:
    """(B, H, T, D), dense, in (B, T, H, D) memory order where x is: what a model's projection gives, and wants back."""
    B, H, T, D = x.shape
    if x.stride(1) < x.stride(2):
        return _op.empty((B, T, H, D), dtype=x.dtype, device=x.device).transpose(1, 2)
    return _op.empty((B, H, T, D), dtype=x.dtype, device=x.device)


def refuse_lanes(**tensors: Tensor) -> str | None:
    for name, t in tensors.items():
        if t.stride(-1) != 1 and t.shape[-1] > 1:
            return f"it reads {name} with stride 1 in the last dim"
    return None


def refuse(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: object) -> str | None:
    return _op.refuse_unless_cpu(q, k, cos, sin) or refuse_lanes(q=q, k=k, cos=cos, sin=sin)


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    q_out, k_out = empty_like(q), empty_like(k)
    _cpu.apply_rotary(q, k, cos, sin, q_out, k_out, interleaved, get_num_threads())
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
    if block_table is not None:
        return "it writes a cache in one piece, not in pages"
    if k_scale is not None and q.shape[-1] > MAX_INT8_D:
        return f"it writes heads of up to {MAX_INT8_D} to an int8 cache, not {q.shape[-1]}"
    return _op.refuse_unless_cpu(q, k, v, cos, sin, k_cache, v_cache, positions, slots, k_scale, v_scale) or refuse_lanes(
        q=q, k=k, v=v, cos=cos, sin=sin, k_cache=k_cache, v_cache=v_cache
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
    q_out = empty_like(q)
    caches = q_out, k_cache, v_cache, positions, slots, k_scale, v_scale
    _cpu.apply_rotary_cache(q, k, v, cos, sin, *caches, interleaved, get_num_threads())
    _op.note_write(k_cache, v_cache, *(() if k_scale is None or v_scale is None else (k_scale, v_scale)))
    return q_out
