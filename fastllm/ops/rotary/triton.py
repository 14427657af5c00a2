"""Rotary in Triton: a program turns BLOCK_H heads of one token; q, k and the cache's k and v share one launch.

Cost: 2 (H + Hk) D elements moved a token (2 (H + 2 Hk) D with the cache); 3 flops an element: bandwidth is the limit. On an
H200, whose copies reach about 4.3 TB/s, 4096 tokens of 32 + 8 heads of 128 in bf16 are 84 MB, 20 us at best.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .. import _op
from .._launch import GPU, LaunchTable, warps
from .._triton import COMPILER, Build, device_of, power_of_two
from .._triton_kernels import int8_round, int8_scale

BLOCK_H = 8


@triton.jit
def _lanes(x_ptr, x_at, heads, first, D, BLOCK: tl.constexpr):
    lane = first + tl.arange(0, BLOCK)
    return tl.load(x_ptr + x_at + lane[None, :], mask=heads & (lane < D)[None, :], other=0.0)


@triton.jit
def _store_lanes(y_ptr, y_at, heads, first, D, y, BLOCK: tl.constexpr):
    lane = first + tl.arange(0, BLOCK)
    tl.store(y_ptr + y_at + lane[None, :], y.to(y_ptr.dtype.element_ty), mask=heads & (lane < D)[None, :])


@triton.jit
def _largest(x):
    """Of each row: its largest magnitude, and whether all of it is finite."""
    size = tl.abs(x)
    return tl.max(size, 1), tl.min((size < float("inf")).to(tl.int32), 1)


@triton.jit
def _copy(
    x_ptr, x_at, y_ptr, y_at, scale_at, heads, D, BLOCK: tl.constexpr, QUANTIZED: tl.constexpr
):  # fmt: skip
    """A head's lanes as they are, or as int8 with a scale at scale_at (heads, 1)."""
    x = _lanes(x_ptr, x_at, heads, 0, D, BLOCK)
    if QUANTIZED:
        x = x.to(tl.float32)
        largest, finite = _largest(x)
        scale, inverse = int8_scale(tl.where(finite != 0, largest, 1.0), finite != 0)
        tl.store(scale_at, scale[:, None], mask=heads)
        x = int8_round(x, inverse[:, None])
    _store_lanes(y_ptr, y_at, heads, 0, D, x, BLOCK)


@triton.jit
def _turn(
    x_ptr, x_at, y_ptr, y_at, scale_at, heads, cos_ptr, sin_ptr, known_pairs, D, R,
    BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr, INTERLEAVED: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """(a, b) -> (a cos - b sin, b cos + a sin) for the heads' first R lanes; the others are copied. QUANTIZED: as int8, with a
    scale at scale_at (heads, 1)."""
    pair = tl.arange(0, BLOCK_PAIRS)
    turning = pair < R // 2
    lane_a = 2 * pair if INTERLEAVED else pair
    lane_b = 2 * pair + 1 if INTERLEAVED else pair + R // 2
    mask = heads & turning[None, :]
    # A position outside of the table is the caller's mistake; NaN shows it, where a read of other memory would not.
    nan = float("nan")
    cos_a = tl.load(cos_ptr + lane_a, mask=pair < known_pairs, other=nan).to(tl.float32)[None, :]
    cos_b = tl.load(cos_ptr + lane_b, mask=pair < known_pairs, other=nan).to(tl.float32)[None, :]
    sin_a = tl.load(sin_ptr + lane_a, mask=pair < known_pairs, other=nan).to(tl.float32)[None, :]
    sin_b = tl.load(sin_ptr + lane_b, mask=pair < known_pairs, other=nan).to(tl.float32)[None, :]
    a = tl.load(x_ptr + x_at + lane_a[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + x_at + lane_b[None, :], mask=mask, other=0.0).to(tl.float32)
    dtype = y_ptr.dtype.element_ty
    turned_a = a * cos_a - b * sin_a
    turned_b = b * cos_b + a * sin_b
    if QUANTIZED:
        # Lanes that are not there are 0 times a NaN of the tables.
        turned_a = tl.where(turning[None, :], turned_a, 0.0)
        turned_b = tl.where(turning[None, :], turned_b, 0.0)
        largest, finite = _largest(turned_a)
        largest_b, finite_b = _largest(turned_b)
        largest = tl.maximum(largest, largest_b)
        finite = finite & finite_b
        if BLOCK_REST > 0:
            rest = _lanes(x_ptr, x_at, heads, R, D, BLOCK_REST).to(tl.float32)
            largest_rest, finite_rest = _largest(rest)
            largest = tl.maximum(largest, largest_rest)
            finite = finite & finite_rest
        scale, inverse = int8_scale(tl.where(finite != 0, largest, 1.0), finite != 0)
        tl.store(scale_at, scale[:, None], mask=heads)
        turned_a = int8_round(turned_a, inverse[:, None])
        turned_b = int8_round(turned_b, inverse[:, None])
        if BLOCK_REST > 0:
            _store_lanes(y_ptr, y_at, heads, R, D, int8_round(rest, inverse[:, None]), BLOCK_REST)
    elif BLOCK_REST > 0:
        _store_lanes(y_ptr, y_at, heads, R, D, _lanes(x_ptr, x_at, heads, R, D, BLOCK_REST), BLOCK_REST)
    tl.store(y_ptr + y_at + lane_a[None, :], turned_a.to(dtype), mask=mask)
    tl.store(y_ptr + y_at + lane_b[None, :], turned_b.to(dtype), mask=mask)


@triton.jit
def _rotary_fwd_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, v_out_ptr, k_scale_ptr, v_scale_ptr, position_ptr, slot_ptr, table_ptr,
    T, H, Hk, D, R, positions, slots,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st,
    qo_sb, qo_sh, qo_st, ko_sb, ko_sh, ko_st, vo_sb, vo_sh, vo_st,
    ks_sb, ks_sh, ks_st, vs_sb, vs_sh, vs_st, cos_sb, cos_sp, sin_sb, sin_sp, position_sb, position_st, slot_sb, slot_st,
    table_sb, table_sp, num_pages,
    BLOCK_H: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_D: tl.constexpr,
    TABLE: tl.constexpr, CACHE: tl.constexpr, INTERLEAVED: tl.constexpr, QUANTIZED: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    """TABLE: cos and sin have a row for each position, else for each token. CACHE: k and v go to slots of the caches, which are
    int8 if QUANTIZED, and if PAGE is not 0 in pages of so many rows."""
    b = (tl.program_id(0) // T).to(tl.int64)
    t = (tl.program_id(0) % T).to(tl.int64)
    block = tl.program_id(1)
    q_blocks = tl.cdiv(H, BLOCK_H)
    k_blocks = tl.cdiv(Hk, BLOCK_H)
    at = t
    if TABLE:
        at = tl.load(position_ptr + b * position_sb + t * position_st)
    known_pairs = tl.where((at >= 0) & (at < positions), R // 2, 0)
    slot = t
    if CACHE:
        slot = tl.load(slot_ptr + b * slot_sb + t * slot_st)
    writable = tl.where((slot >= 0) & (slot < slots), Hk, 0)  # heads
    piece = b  # of the caches: the sequence's, or a page
    if PAGE > 0:
        piece = tl.load(table_ptr + b * table_sb + slot // PAGE * table_sp, mask=writable > 0, other=0).to(tl.int64)
        writable = tl.where((piece >= 0) & (piece < num_pages), writable, 0)
        slot = slot % PAGE
    h = tl.arange(0, BLOCK_H)
    cos = cos_ptr + b * cos_sb + at * cos_sp
    sin = sin_ptr + b * sin_sb + at * sin_sp
    if block < q_blocks:
        h += block * BLOCK_H
        head = h.to(tl.int64)[:, None]
        _turn(
            q_ptr, b * q_sb + head * q_sh + t * q_st, q_out_ptr, b * qo_sb + head * qo_sh + t * qo_st, 0, (h < H)[:, None],
            cos, sin, known_pairs, D, R, BLOCK_PAIRS, BLOCK_REST, INTERLEAVED, False,
        )  # fmt: skip
    elif block < q_blocks + k_blocks:
        h += (block - q_blocks) * BLOCK_H
        head = h.to(tl.int64)[:, None]
        scale_at = 0
        if QUANTIZED:
            scale_at = k_scale_ptr + piece * ks_sb + head * ks_sh + slot * ks_st
        _turn(
            k_ptr, b * k_sb + head * k_sh + t * k_st, k_out_ptr, piece * ko_sb + head * ko_sh + slot * ko_st, scale_at,
            (h < writable)[:, None], cos, sin, known_pairs, D, R, BLOCK_PAIRS, BLOCK_REST, INTERLEAVED, QUANTIZED,
        )  # fmt: skip
    elif CACHE:
        h += (block - q_blocks - k_blocks) * BLOCK_H
        head = h.to(tl.int64)[:, None]
        scale_at = 0
        if QUANTIZED:
            scale_at = v_scale_ptr + piece * vs_sb + head * vs_sh + slot * vs_st
        _copy(
            v_ptr, b * v_sb + head * v_sh + t * v_st, v_out_ptr, piece * vo_sb + head * vo_sh + slot * vo_st, scale_at,
            (h < writable)[:, None], D, BLOCK_D, QUANTIZED,
        )  # fmt: skip


def _shipped(gpu: GPU, D: int, R: int) -> dict[str, Any]:
    pairs, rest = power_of_two(R // 2), D - R
    return {
        "BLOCK_H": BLOCK_H,
        "BLOCK_PAIRS": pairs,
        "BLOCK_REST": power_of_two(rest) if rest else 0,
        "BLOCK_D": power_of_two(D),
        "num_warps": min(8, max(1, BLOCK_H * pairs // 256)),
    }


def _candidates(gpu: GPU, D: int, R: int) -> Iterator[dict[str, Any]]:
    base = _shipped(gpu, D, R)
    yield from warps(base, base["num_warps"] // 2, base["num_warps"] * 2)


_LAUNCHES = LaunchTable("rotary", _shipped, _candidates)


def _refuse_lanes(**tensors: Tensor) -> str | None:
    for name, t in tensors.items():
        if t.stride(-1) != 1 and t.shape[-1] > 1:
            return f"it reads {name} with stride 1 in the last dim"
    return None


def refuse(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> str | None:
    if rest and isinstance(rest[0], Tensor):  # apply_rotary_cache: v comes third
        v, k_cache, v_cache = cos, rest[1], rest[2]
        cos, sin = sin, rest[0]
        return _refuse_lanes(q=q, k=k, v=v, cos=cos, sin=sin, k_cache=k_cache, v_cache=v_cache)
    return _refuse_lanes(q=q, k=k, cos=cos, sin=sin)


def _empty_like(x: Tensor) -> Tensor:
    """(B, H, T, D), dense, in (B, T, H, D) memory order where x is: what a model's projection gives, and wants back."""
    B, H, T, D = x.shape
    if x.stride(1) < x.stride(2):
        return _op.empty((B, T, H, D), dtype=x.dtype, device=x.device).transpose(1, 2)
    return _op.empty((B, H, T, D), dtype=x.dtype, device=x.device)


def _strides(x: Tensor, sequences: int) -> tuple[int, int]:
    """Of a (B or 1, N) or (N,) index, or of the first two dims of (B or 1, N, R) or (N, R): sequences and tokens."""
    lead = x.dim() - 1 if x.dtype.is_floating_point else x.dim()
    if lead == 1:
        return 0, x.stride(0)
    return (x.stride(0) if x.shape[0] == sequences and sequences > 1 else 0), x.stride(1)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    v_out: Tensor | None,
    positions: Tensor | None,
    slots: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor | None,
    interleaved: bool,
) -> None:
    B, H, T, D = q.shape
    Hk, R = k.shape[1], cos.shape[-1]
    table, cache = positions is not None and cos.dim() == 2, v_out is not None
    launch = _LAUNCHES(q.device, D, R)
    blocks = triton.cdiv(H, BLOCK_H) + (2 if cache else 1) * triton.cdiv(Hk, BLOCK_H)
    if B * T == 0 or blocks == 0:
        return
    other, other_out = (k, k_out) if v is None or v_out is None else (v, v_out)
    with device_of(q):
        _rotary_fwd_kernel[(B * T, blocks)](
            q, k, v, cos, sin, q_out, k_out, v_out, k_scale, v_scale, positions, slots, block_table,
            T, H, Hk, D, R, cos.shape[-2], k_out.shape[2] * (1 if block_table is None else block_table.shape[1]),
            *q.stride()[:3], *k.stride()[:3], *other.stride()[:3],
            *q_out.stride()[:3], *k_out.stride()[:3], *other_out.stride()[:3],
            *((0, 0, 0) if k_scale is None else k_scale.stride()), *((0, 0, 0) if v_scale is None else v_scale.stride()),
            *_strides(cos, B), *_strides(sin, B),
            *((0, 0) if positions is None else _strides(positions, B)), *((0, 0) if slots is None else _strides(slots, B)),
            *((0, 0) if block_table is None else block_table.stride()), k_out.shape[0],
            TABLE=table, CACHE=cache, INTERLEAVED=interleaved, QUANTIZED=k_scale is not None,
            PAGE=0 if block_table is None else k_out.shape[2], **launch, **COMPILER,
        )  # fmt: skip


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    q_out, k_out = _empty_like(q), _empty_like(k)
    _run(q, k, None, cos, sin, q_out, k_out, None, None, None, None, None, None, interleaved)
    return q_out, k_out


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
    """Positions and slots are read on the device: one outside of its table turns q into NaN and writes nothing to the cache, and so does a page that is not there."""
    q_out = _empty_like(q)
    slots = positions if slots is None else slots
    _run(q, k, v, cos, sin, q_out, k_cache, v_cache, positions, slots, k_scale, v_scale, block_table, interleaved)
    _op.note_write(k_cache, v_cache, *(() if k_scale is None or v_scale is None else (k_scale, v_scale)))
    return q_out


def builds(gpu: GPU) -> Iterator[Build]:
    names = [f"{t}_{s}" for t in ("q", "k", "v", "qo", "ko", "vo") for s in ("sb", "sh", "st")]
    names += [f"{t}_{s}" for t in ("cos", "sin") for s in ("sb", "sp")] + [
        f"{t}_{s}" for t in ("position", "slot") for s in ("sb", "st")
    ]
    scale_names = [f"{t}_{s}" for t in ("ks", "vs") for s in ("sb", "sh", "st")]
    integers = dict.fromkeys(["T", "H", "Hk", "D", "R", "positions", "slots", *names], "i32")
    pointers = ("q_ptr", "k_ptr", "v_ptr", "q_out_ptr", "k_out_ptr", "v_out_ptr", "position_ptr", "slot_ptr")
    for dtype in ("bf16", "fp32"):
        for D, R in ((64, 64), (128, 128), (256, 64)):
            for into in ("", "cache", "int8 cache", "int8 cache in pages"):
                cache, quantized, paged = into != "", "int8" in into, "pages" in into
                signature = {
                    **dict.fromkeys(pointers, f"*{dtype}"),
                    **dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32"),
                    **integers,
                }
                constants: dict[str, Any] = {"TABLE": cache, "CACHE": cache, "INTERLEAVED": False, "QUANTIZED": quantized}
                constants["PAGE"] = 16 if paged else 0
                if paged:
                    signature |= {"table_ptr": "*i32", "table_sb": "i32", "table_sp": "i32", "num_pages": "i32"}
                if cache:
                    signature |= dict.fromkeys(("position_ptr", "slot_ptr"), "*i64")
                else:
                    for name in ("v_ptr", "v_out_ptr", "position_ptr", "slot_ptr"):
                        del signature[name]
                if quantized:
                    signature |= dict.fromkeys(("k_out_ptr", "v_out_ptr"), "*i8") | dict.fromkeys(scale_names, "i32")
                    signature |= dict.fromkeys(("k_scale_ptr", "v_scale_ptr"), "*fp32")
                else:
                    constants |= dict.fromkeys(scale_names, 0)
                name = f"D={D} R={R} {dtype}" + (f" {into}" if into else "")
                yield Build(_rotary_fwd_kernel, name, signature, constants, _shipped(gpu, D, R), aligned=("D", "R", *names))
