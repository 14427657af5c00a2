"""Rotary on the CPU: allocates the outputs, calls fastllm._cpu."""

from __future__ import annotations

from typing import Any

from torch import Tensor, get_num_threads

from ...backends import cpu_module
from .. import _op

_cpu: Any = cpu_module()


def empty_like(x: Tensor) -> Tensor:
    """(B, H, T, D), dense, in (B, T, H, D) memory order where x is: what a model's projection gives, and wants back."""
    B, H, T, D = x.shape
    if x.stride(1) < x.stride(2):
        return _op.empty((B, T, H, D), dtype=x.dtype).transpose(1, 2)
    return _op.empty((B, H, T, D), dtype=x.dtype)


def _refuse_lanes(**tensors: Tensor) -> str | None:
    for name, t in tensors.items():
        if t.stride(-1) != 1 and t.shape[-1] > 1:
            return f"it reads {name} with stride 1 in the last dim"
    return None


def refuse(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: object) -> str | None:
    return _op.refuse_unless_cpu(q, k, cos, sin) or _refuse_lanes(q=q, k=k, cos=cos, sin=sin)


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
    *_: object,
) -> str | None:
    return _op.refuse_unless_cpu(q, k, v, cos, sin, k_cache, v_cache, positions, slots) or _refuse_lanes(
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
    interleaved: bool,
) -> Tensor:
    q_out = empty_like(q)
    _cpu.apply_rotary_cache(q, k, v, cos, sin, q_out, k_cache, v_cache, positions, slots, interleaved, get_num_threads())
    _op.note_write(k_cache, v_cache)
    return q_out
