"""attention in Triton: blocked online softmax for prefill, keys split over programs for decode; no T x S matrix in either.

Cost: 4 D flops for each pair of a query and a key that it sees. Prefill: k and v are read once by each of the T / BLOCK_M
programs of a head, from L2 after the first; at BLOCK_M = 128 in bf16 that is 128 flops a byte or more, so the matrix units and
one exp2 a pair are the limit: T = 4096, H = 32, D = 128, causal is 137 GFLOP, about 0.2 ms at the 650 TFLOP/s that an H200's
matrix units sustain. Decode: k and v are read once for all query heads that share them, 2 S Hk D elements, and partial results
of R D fp32 a split are written and read (R rows, 128 keys a split: 2 R / 128 of the keys' bytes in bf16, mostly in L2).
Bandwidth is the limit: S = 32768, Hk = 8, D = 128 in bf16 is 134 MB, 31 us at the 4.3 TB/s that an H200's copies reach.

Sources: Milakov and Gimelshein 2018 (online softmax); Dao 2023, arXiv:2307.08691; Dao et al. 2023, Flash-Decoding (splits).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _op
from .._launch import GPU, LaunchTable, warps
from .._triton import COMPILER, Build, device_of, power_of_two
from .._triton_kernels import tanh
from . import values

# Up to this many rows (query tokens times query heads that share a key/value head) the decode kernel serves.
DECODE_ROWS = 16
# Keys of a split. Fixed, so that neither the batch nor the cache's capacity changes a row's bits: B = 1, Hk = 8, S = 2048 gives
# 128 programs, about one for each of an H200's 132 multiprocessors.
SPLIT = 128
SPLITS = 16  # the reduction adds this many at a time
REDUCE_D = 64  # elements of a row that one of its programs adds up
LOG2E = math.log2(math.e)

MAX_D = 512
MAX_GRID = 65535  # of a grid's second and third dim
MAX_STRIDE = 1 << 24  # of tokens: a tile of 128 of them spans less than 2^31 elements


@triton.jit
def _num_keys(lens_ptr, b, stride, S, HAS_LENS: tl.constexpr):
    keys = S
    if HAS_LENS:
        keys = tl.minimum(tl.maximum(tl.load(lens_ptr + b * stride), 0), S).to(tl.int32)
    return keys


@triton.jit
def _visible(keys, low, high, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Keys [begin, end) that a query at one of the positions low .. high sees before any mask; with low and high swapped,
    those that all of them see."""
    begin = keys * 0
    end = keys
    if CAUSAL:
        end = tl.minimum(end, high + 1)
    if HAS_WINDOW:
        begin = tl.maximum(begin, low - window + 1)
        end = tl.minimum(end, high + window)
    return begin, tl.maximum(end, 0)


@triton.jit
def _pages(table_ptr, stride, start, keys, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, PAGE: tl.constexpr):
    """Where tokens [start, start + BLOCK_N) lie: one page for all where pages hold whole tiles, else a page for each; the
    table is not read from ``keys`` on."""
    if PAGE % BLOCK_N == 0:
        page = tl.load(table_ptr + start // PAGE * stride)
    else:
        n = tl.arange(0, BLOCK_N)
        at = table_ptr + (start + n) // PAGE * stride
        page = tl.load(at, mask=n < keys - start, other=0) if EDGE else tl.load(at)
    return page.to(tl.int64)


@triton.jit
def _tile(
    ptr, start, stride, page, stride_page, keys,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr, PAGE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Tokens [start, start + BLOCK_N) of k or v; zeros beyond D and, at an edge, from ``keys`` on, whatever lies there."""
    if TMA:  # ptr is a descriptor, whose bounds are keys and D
        x = ptr.load([start, 0])
    else:
        n = tl.arange(0, BLOCK_N)[:, None]
        d = tl.arange(0, BLOCK_D)[None, :]
        if PAGE == 0:
            at = ptr + tl.cast(start, tl.int64) * stride + (n * stride + d)  # in a tile 32 bits reach, see refuse()
        elif PAGE % BLOCK_N == 0:
            at = ptr + page * stride_page + tl.cast(start % PAGE, tl.int64) * stride + (n * stride + d)
        else:
            at = ptr + page[:, None] * stride_page + ((start + n) % PAGE).to(tl.int64) * stride + d
        if EDGE:
            inside = n < keys - start
            x = tl.load(at, mask=inside if BLOCK_D == D else inside & (d < D), other=0.0)
        elif BLOCK_D == D:
            x = tl.load(at)
        else:
            x = tl.load(at, mask=d < D, other=0.0)
    return x


@triton.jit
def _scales(
    ptr, start, stride, page, stride_page, keys, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, PAGE: tl.constexpr
):  # fmt: skip
    """What a step of int8 is worth in tokens [start, start + BLOCK_N) of k or v; 0 from ``keys`` on."""
    n = tl.arange(0, BLOCK_N)
    if PAGE == 0:
        at = ptr + (start + n).to(tl.int64) * stride
    else:
        at = ptr + page * stride_page + ((start + n) % PAGE).to(tl.int64) * stride
    return tl.load(at, mask=n < keys - start, other=0.0) if EDGE else tl.load(at)


@triton.jit
def _step(
    acc, top, total, q, start, keys, position, k_ptr, v_ptr, stride_ks, stride_vs, pages, scales,
    mask_at, mask_row, stride_ms, factor, c, softcap, window,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_MASK: tl.constexpr, ADDITIVE: tl.constexpr, SCALED: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PAGE: tl.constexpr, HAS_SCALES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """_walk's step: the keys [start, start + BLOCK_N)."""
    n = tl.arange(0, BLOCK_N)[None, :]
    table_ptr, stride_tp, stride_kp, stride_vp = pages
    k_scale_ptr, stride_k_scale_p, stride_k_scale_s, v_scale_ptr, stride_v_scale_p, stride_v_scale_s = scales
    page = 0
    if PAGE > 0:
        page = _pages(table_ptr, stride_tp, start, keys, BLOCK_N, EDGE, PAGE)
    k = _tile(k_ptr, start, stride_ks, page, stride_kp, keys, D, BLOCK_N, BLOCK_D, EDGE, PAGE, TMA).to(q.dtype)
    z = tl.dot(q, tl.trans(k), input_precision="ieee")
    if HAS_SCALES:
        z *= _scales(k_scale_ptr, start, stride_k_scale_s, page, stride_k_scale_p, keys, BLOCK_N, EDGE, PAGE)[None, :]
    if HAS_SOFTCAP:
        z = softcap * tanh(z * factor, q.dtype == tl.float32)
    elif SCALED:
        z = z * factor
    key = start + n
    if HAS_MASK:
        inside = mask_row
        if EDGE:
            inside = inside & (key < keys)
        mask = tl.load(mask_at + key.to(tl.int64) * stride_ms, mask=inside, other=0)
        if ADDITIVE:
            z += mask.to(tl.float32)
        else:
            z = tl.where(mask != 0, z, float("-inf"))
    if EDGE:
        see = key < keys
        if CAUSAL:
            see = see & (key <= position)
        if HAS_WINDOW:
            see = see & (tl.abs(position - key) < window)
        z = tl.where(see, z, float("-inf"))

    if ADDITIVE:
        new = tl.maximum(top, tl.max(z, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)  # where nothing is visible yet, -inf - -inf would be NaN
        p = tl.exp2((z - shift[:, None]) * c)
        correction = tl.exp2((top - shift) * c)
    else:
        new = tl.maximum(top, tl.max(z, 1) * c)
        shift = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(tl.fma(z, c, -shift[:, None]))
        correction = tl.exp2(top - shift)
    top = new
    total = total * correction + tl.sum(p, 1)
    v = _tile(v_ptr, start, stride_vs, page, stride_vp, keys, D, BLOCK_N, BLOCK_D, EDGE, PAGE, TMA).to(q.dtype)
    if HAS_SCALES:
        scale = _scales(v_scale_ptr, start, stride_v_scale_s, page, stride_v_scale_p, keys, BLOCK_N, EDGE, PAGE)
        p *= (scale * 64.0)[None, :]
    acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision="ieee")
    return acc, top, total


@triton.jit
def _walk(
    acc, top, total, q, first, last, keys, position, k_ptr, v_ptr, stride_ks, stride_vs, pages, scales,
    mask_at, mask_row, stride_ms, factor, c, softcap, window,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_MASK: tl.constexpr, ADDITIVE: tl.constexpr, SCALED: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PAGE: tl.constexpr, HAS_SCALES: tl.constexpr, TMA: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Adds the keys [first, last) to (acc, top, total), the online softmax of the rows of q; first is a multiple of BLOCK_N.

    The weight of a score z is 2^(c z - top), one fused multiply-add before the exp2, and top = c max(z) is rounded once, when
    it is found: a product in 2^(top - new) would be fused anew and drift from tile to tile. An additive mask may hold the
    lowest float, which c would turn into minus infinity: there top is max(z) and the weight 2^(c (z - top)).

    mask_at (rows, 1) points at each row of the mask, mask_row (rows, 1) is whether there is such a row.
    pages (block table's row, its stride, strides of k's and v's pages) is used where PAGE, a page's tokens, is not 0.
    scales (of k, its strides, of v, its strides) belong to an int8 cache. Its integers are exact in q's dtype and k's scale
    multiplies the score; v's goes into the weight, 64 times larger, so that fp16 holds it wherever fp16 would hold v: acc is
    then 64 times too large.

    With SPECIALIZE some warps fetch tiles, one issues the products and the rest do the softmax, each ahead of the next.
    """
    if SPECIALIZE:  # a branch, because Triton before 3.4 does not know the argument
        for start in tl.range(first, last, BLOCK_N, warp_specialize=True):
            acc, top, total = _step(
                acc, top, total, q, start, keys, position, k_ptr, v_ptr, stride_ks, stride_vs, pages, scales,
                mask_at, mask_row, stride_ms, factor, c, softcap, window,
                D, BLOCK_N, BLOCK_D, EDGE, CAUSAL, HAS_WINDOW, HAS_MASK, ADDITIVE, SCALED, HAS_SOFTCAP, PAGE, HAS_SCALES, TMA,
            )  # fmt: skip
    else:
        for start in range(first, last, BLOCK_N):
            acc, top, total = _step(
                acc, top, total, q, start, keys, position, k_ptr, v_ptr, stride_ks, stride_vs, pages, scales,
                mask_at, mask_row, stride_ms, factor, c, softcap, window,
                D, BLOCK_N, BLOCK_D, EDGE, CAUSAL, HAS_WINDOW, HAS_MASK, ADDITIVE, SCALED, HAS_SOFTCAP, PAGE, HAS_SCALES, TMA,
            )  # fmt: skip
    return acc, top, total


@triton.jit
def _cache(
    k_ptr, v_ptr, table_ptr, k_scale_ptr, v_scale_ptr, b, head,
    stride_kb, stride_kh, stride_vb, stride_vh, stride_tb, stride_tp,
    stride_k_scale_b, stride_k_scale_h, stride_k_scale_s, stride_v_scale_b, stride_v_scale_h, stride_v_scale_s,
    PAGE: tl.constexpr, HAS_SCALES: tl.constexpr,
):  # fmt: skip
    """k and v of one key/value head and, as _walk takes them, its pages and scales. The first dim of each is the sequence,
    or the page."""
    if PAGE == 0:
        k_ptr += b * stride_kb + head * stride_kh
        v_ptr += b * stride_vb + head * stride_vh
        table_ptr = k_ptr  # never read, as below: Triton 3.6 cannot return None
    else:
        k_ptr += head * stride_kh
        v_ptr += head * stride_vh
        table_ptr += b * stride_tb
    if HAS_SCALES:
        k_scale_ptr += head * stride_k_scale_h
        v_scale_ptr += head * stride_v_scale_h
        if PAGE == 0:
            k_scale_ptr += b * stride_k_scale_b
            v_scale_ptr += b * stride_v_scale_b
    else:
        k_scale_ptr = k_ptr
        v_scale_ptr = v_ptr
    pages = (table_ptr, stride_tp, stride_kb, stride_vb)
    scales = (k_scale_ptr, stride_k_scale_b, stride_k_scale_s, v_scale_ptr, stride_v_scale_b, stride_v_scale_s)
    return k_ptr, v_ptr, pages, scales


@triton.jit
def _sink(sinks_ptr, at, ADDITIVE: tl.constexpr):
    """A sink is a key of value 0 that each row has seen beforehand: top, in _walk's units; total is 1."""
    sink = tl.load(sinks_ptr + at).to(tl.float32)
    if not ADDITIVE:
        sink = sink * 1.4426950408889634
    return sink


@triton.jit(do_not_specialize=["T", "S"])
def _attention_prefill_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, lens_ptr, sinks_ptr, table_ptr, k_scale_ptr, v_scale_ptr, o_ptr,
    T, S, G, factor, c, softcap, window,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_ot, stride_mb, stride_mh, stride_mt, stride_ms, stride_lens, stride_sinks,
    stride_tb, stride_tp,
    stride_k_scale_b, stride_k_scale_h, stride_k_scale_s, stride_v_scale_b, stride_v_scale_h, stride_v_scale_s,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_MASK: tl.constexpr, ADDITIVE: tl.constexpr, SCALED: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_LENS: tl.constexpr, HAS_SINKS: tl.constexpr, PAGE: tl.constexpr, HAS_SCALES: tl.constexpr,
    TMA: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_M queries of one head. Tiles of keys that all of them see need no comparison."""
    # Causal: the last queries see the most keys and go first, so that no long program is left at the end.
    t0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    keys = _num_keys(lens_ptr, b, stride_lens, S, HAS_LENS)
    m0 = tl.arange(0, BLOCK_M)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    row = m0 < T - t0
    inside = row & (d < D)
    q_at = q_ptr + b * stride_qb + h * stride_qh + t0.to(tl.int64) * stride_qt + (m0 * stride_qt + d)
    q = tl.load(q_at, mask=inside, other=0.0)
    k_ptr, v_ptr, pages, scales = _cache(
        k_ptr, v_ptr, table_ptr, k_scale_ptr, v_scale_ptr, b, h // G,
        stride_kb, stride_kh, stride_vb, stride_vh, stride_tb, stride_tp,
        stride_k_scale_b, stride_k_scale_h, stride_k_scale_s, stride_v_scale_b, stride_v_scale_h, stride_v_scale_s,
        PAGE, HAS_SCALES,
    )  # fmt: skip
    if TMA:  # the copy engine brings whole tiles: no thread holds an address
        k_ptr = tl.make_tensor_descriptor(k_ptr, [tl.maximum(keys, 1), D], [stride_ks, 1], [BLOCK_N, BLOCK_D])
        v_ptr = tl.make_tensor_descriptor(v_ptr, [tl.maximum(keys, 1), D], [stride_vs, 1], [BLOCK_N, BLOCK_D])
    mask_at = mask_ptr
    if HAS_MASK:
        mask_at = mask_ptr + b * stride_mb + h * stride_mh + (t0 + m0).to(tl.int64) * stride_mt

    low = keys - T + t0
    high = tl.minimum(low + BLOCK_M, keys) - 1
    position = low + m0
    begin, end = _visible(keys, low, high, window, CAUSAL, HAS_WINDOW)
    all_begin, all_end = _visible(keys, high, low, window, CAUSAL, HAS_WINDOW)
    first = begin // BLOCK_N * BLOCK_N
    full = tl.cdiv(all_begin, BLOCK_N) * BLOCK_N
    edge = tl.maximum(all_end // BLOCK_N * BLOCK_N, full)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_SINKS:
        top = tl.zeros([BLOCK_M], tl.float32) + _sink(sinks_ptr, h * stride_sinks, ADDITIVE)
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_WINDOW:
        acc, top, total = _walk(
            acc, top, total, q, first, tl.minimum(full, end), keys, position,
            k_ptr, v_ptr, stride_ks, stride_vs, pages, scales, mask_at, row, stride_ms, factor, c, softcap, window,
            D, BLOCK_N, BLOCK_D, True, CAUSAL, HAS_WINDOW, HAS_MASK, ADDITIVE, SCALED, HAS_SOFTCAP, PAGE, HAS_SCALES,
            TMA, SPECIALIZE,
        )  # fmt: skip
    acc, top, total = _walk(
        acc, top, total, q, full, edge, keys, position,
        k_ptr, v_ptr, stride_ks, stride_vs, pages, scales, mask_at, row, stride_ms, factor, c, softcap, window,
        D, BLOCK_N, BLOCK_D, False, CAUSAL, HAS_WINDOW, HAS_MASK, ADDITIVE, SCALED, HAS_SOFTCAP, PAGE, HAS_SCALES,
        TMA, SPECIALIZE,
    )  # fmt: skip
    acc, top, total = _walk(
        acc, top, total, q, edge, end, keys, position,
        k_ptr, v_ptr, stride_ks, stride_vs, pages, scales, mask_at, row, stride_ms, factor, c, softcap, window,
        D, BLOCK_N, BLOCK_D, True, CAUSAL, HAS_WINDOW, HAS_MASK, ADDITIVE, SCALED, HAS_SOFTCAP, PAGE, HAS_SCALES,
        TMA, SPECIALIZE,
    )  # fmt: skip

    if HAS_SCALES:
        acc *= 1.0 / 64.0
    o = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # a row that sees no key has acc 0, and gives zeros
    o_at = o_ptr + b * stride_ob + h * stride_oh + t0.to(tl.int64) * stride_ot + (m0 * stride_ot + d)
    tl.store(o_at, o.to(q.dtype), mask=inside)


@triton.jit(do_not_specialize=["T", "S"])
def _attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, lens_ptr, table_ptr, k_scale_ptr, v_scale_ptr, acc_ptr, top_ptr, total_ptr,
    T, S, H, Hk, factor, c, softcap, window,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_mb, stride_mh, stride_mt, stride_ms, stride_lens,
    stride_tb, stride_tp,
    stride_k_scale_b, stride_k_scale_h, stride_k_scale_s, stride_v_scale_b, stride_v_scale_h, stride_v_scale_s,
    D: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_MASK: tl.constexpr, ADDITIVE: tl.constexpr, SCALED: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_LENS: tl.constexpr, PAGE: tl.constexpr, HAS_SCALES: tl.constexpr,
):  # fmt: skip
    """A program: one split of the keys of one key/value head, for BLOCK_M of the T * G rows that share it, token-major."""
    split = tl.program_id(0)
    head = (tl.program_id(1) % Hk).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    keys = _num_keys(lens_ptr, b, stride_lens, S, HAS_LENS)
    G = H // Hk
    r0 = tl.program_id(1) // Hk * BLOCK_M
    r = r0 + tl.arange(0, BLOCK_M)[:, None]
    row = r < T * G
    t = r // G
    h = head * G + r % G
    low = keys - T + r0 // G
    high = keys - T + tl.minimum(r0 + BLOCK_M - 1, T * G - 1) // G
    begin, end = _visible(keys, low, high, window, CAUSAL, HAS_WINDOW)
    first = tl.maximum(begin, split * SPLIT)
    last = tl.minimum(end, (split + 1) * SPLIT)
    if first >= last:  # the reduction will not ask for this split
        return

    d = tl.arange(0, BLOCK_D)[None, :]
    q_at = q_ptr + b * stride_qb + h * stride_qh + t.to(tl.int64) * stride_qt + d
    q = tl.load(q_at, mask=row & (d < D), other=0.0)
    k_ptr, v_ptr, pages, scales = _cache(
        k_ptr, v_ptr, table_ptr, k_scale_ptr, v_scale_ptr, b, head,
        stride_kb, stride_kh, stride_vb, stride_vh, stride_tb, stride_tp,
        stride_k_scale_b, stride_k_scale_h, stride_k_scale_s, stride_v_scale_b, stride_v_scale_h, stride_v_scale_s,
        PAGE, HAS_SCALES,
    )  # fmt: skip
    mask_at = mask_ptr
    if HAS_MASK:
        mask_at = mask_ptr + b * stride_mb + h * stride_mh + t.to(tl.int64) * stride_mt
    acc, top, total = _walk(
        tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
        tl.full([BLOCK_M], float("-inf"), tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        q, first // BLOCK_N * BLOCK_N, last, keys, keys - T + t,
        k_ptr, v_ptr, stride_ks, stride_vs, pages, scales, mask_at, row, stride_ms, factor, c, softcap, window,
        D, BLOCK_N, BLOCK_D, True, CAUSAL, HAS_WINDOW, HAS_MASK, ADDITIVE, SCALED, HAS_SOFTCAP, PAGE, HAS_SCALES,
        False, False,
    )  # fmt: skip
    if HAS_SCALES:
        acc *= 1.0 / 64.0

    at = ((b * H + h) * T + t) * tl.num_programs(0) + split  # scratch is (B, H, T, splits) and (B, H, T, splits, D)
    tl.store(top_ptr + at, top[:, None], mask=row)
    tl.store(total_ptr + at, total[:, None], mask=row)
    tl.store(acc_ptr + at * D + d, acc, mask=row & (d < D))


@triton.jit(do_not_specialize=["T", "S", "splits"])
def _attention_reduce_kernel(
    acc_ptr, top_ptr, total_ptr, lens_ptr, sinks_ptr, o_ptr,
    T, S, splits, window, stride_ob, stride_oh, stride_ot, stride_lens, stride_sinks,
    D: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, ADDITIVE: tl.constexpr, HAS_LENS: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_D elements of one row of the output. It reads the splits whose keys the row sees, and no other: theirs
    is memory that nobody wrote. Groups of SPLITS start at multiples of it, so that their number does not change a bit."""
    h = (tl.program_id(0) // T).to(tl.int64)
    t = tl.program_id(0) % T
    b = tl.program_id(2).to(tl.int64)
    keys = _num_keys(lens_ptr, b, stride_lens, S, HAS_LENS)
    begin, end = _visible(keys, keys - T + t, keys - T + t, window, CAUSAL, HAS_WINDOW)
    first = begin // SPLIT
    last = tl.where(begin < end, tl.cdiv(end, SPLIT), first)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    if HAS_SINKS:
        top = _sink(sinks_ptr, h * stride_sinks, ADDITIVE)
        total = tl.full([], 1.0, tl.float32)
    else:
        top = tl.full([], float("-inf"), tl.float32)
        total = tl.full([], 0.0, tl.float32)
    row = (b * (tl.num_programs(0) // T) + h) * T + t
    for start in range(first // SPLITS * SPLITS, last, SPLITS):
        s = start + tl.arange(0, SPLITS)
        live = (s >= first) & (s < last)
        at = row * splits + s
        part_top = tl.load(top_ptr + at, mask=live, other=float("-inf"))
        part_total = tl.load(total_ptr + at, mask=live, other=0.0)
        part = tl.load(acc_ptr + at[:, None] * D + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
        new = tl.maximum(top, tl.max(part_top, 0))
        shift = tl.where(new == float("-inf"), 0.0, new)
        weight = part_top - shift
        correction = top - shift
        if ADDITIVE:
            weight = weight * 1.4426950408889634
            correction = correction * 1.4426950408889634
        weight = tl.exp2(weight)
        correction = tl.exp2(correction)
        top = new
        total = total * correction + tl.sum(part_total * weight, 0)
        acc = acc * correction + tl.sum(part * weight[:, None], 0)
    o = acc / tl.where(total == 0.0, 1.0, total)
    o_at = o_ptr + b * stride_ob + h * stride_oh + tl.cast(t, tl.int64) * stride_ot + d
    tl.store(o_at, o.to(o_ptr.dtype.element_ty), mask=d < D)


# BLOCK_D -> BLOCK_M, BLOCK_N, num_warps, num_stages: at most 96 KiB of shared memory for q and the stages of k and v (sm_86
# and sm_120 have 99); accumulators, scores and weights in 128 registers a thread, which leaves room for addresses.
_PREFILL_16 = {
    16: (128, 64, 4, 3),
    32: (128, 64, 4, 3),
    64: (128, 64, 8, 3),
    128: (128, 64, 8, 2),
    256: (64, 32, 8, 2),
    512: (32, 16, 8, 2),
}
_PREFILL_32 = {
    16: (64, 32, 4, 2),
    32: (64, 32, 4, 2),
    64: (32, 16, 4, 2),
    128: (32, 16, 8, 1),
    256: (16, 16, 8, 2),
    512: (16, 16, 8, 1),
}
# Decode waits for memory, not for the matrix units: tiles of keys as long as the stages fit.
_DECODE_16 = {16: (64, 4, 2), 32: (64, 4, 2), 64: (64, 4, 2), 128: (64, 4, 2), 256: (32, 4, 2), 512: (16, 4, 2)}
_DECODE_32 = {16: (64, 4, 2), 32: (64, 4, 2), 64: (64, 4, 2), 128: (16, 4, 2), 256: (16, 4, 2), 512: (16, 4, 1)}


def _block_d(D: int) -> int:
    return max(16, power_of_two(D))  # a matrix instruction's least depth


def _shipped_prefill(gpu: GPU, block_d: int, itemsize: int, masked: int, windowed: int, quantized: int) -> dict[str, Any]:
    """A mask's tiles, and int8 ones as they are widened, take registers and shared memory too: half of the keys leave room, and
    for wide heads half of the rows; so does a window's third loop."""
    block_m, block_n, num_warps, num_stages = (_PREFILL_32 if itemsize == 4 else _PREFILL_16)[block_d]
    if masked or quantized:
        block_n = max(16, block_n // 2)
    if (masked or quantized or windowed) and itemsize == 2 and block_d >= 128:
        block_m, num_warps = block_m // 2, num_warps if masked else num_warps // 2
    if gpu.major == 12 and itemsize == 4 and block_d == 128:  # there Triton's layout of the larger tile spills
        block_m, num_warps = block_m // 2, num_warps // 2
    return {**_launch(gpu, block_m, block_n, block_d, num_warps, num_stages), "TMA": 0, "SPECIALIZE": 0}


def _shipped_decode(gpu: GPU, block_d: int, itemsize: int, paged: int, quantized: int) -> dict[str, Any]:
    block_n, num_warps, num_stages = (_DECODE_32 if itemsize == 4 else _DECODE_16)[block_d]
    if itemsize == 4:  # addresses of pages, and int8 tiles that wait to be widened, would spill; tiles stay, and so do bits
        num_warps = 8 if paged or quantized or (gpu.major == 8 and block_d == 64) else num_warps  # sm_80: a window spills
        num_stages = 1 if quantized else num_stages
    return _launch(gpu, 16, block_n, block_d, num_warps, num_stages)


def _launch(gpu: GPU, block_m: int, block_n: int, block_d: int, num_warps: int, num_stages: int) -> dict[str, Any]:
    num_stages = 1 if gpu.hip else num_stages  # 64 KiB of shared memory
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": num_warps, "num_stages": num_stages}


def _copies(gpu: GPU) -> Iterator[tuple[int, int]]:
    """TMA and SPECIALIZE as they make sense there: whether tiles come through tensor descriptors, which takes a copy engine and a
    Triton (3.4 and newer) that drives it, and whether warps then have different work. For sm_90 Triton 3.6 and 3.9 either
    ignore that or fail to compile, by the number of warps; for sm_100 and sm_120 they do it."""
    yield 0, 0
    if gpu.major >= 9 and not gpu.hip and hasattr(tl, "make_tensor_descriptor"):
        yield 1, 0
        if gpu.major >= 10 and "warp_specialize" in inspect.signature(tl.range.__init__).parameters:
            yield 1, 1


def _prefill_candidates(
    gpu: GPU, block_d: int, itemsize: int, masked: int, windowed: int, quantized: int
) -> Iterator[dict[str, Any]]:
    for block_m in (64, 128):
        for block_n in (32, 64, 128):
            for num_stages in (2, 3, 4):
                for tma, specialize in _copies(gpu):
                    launch = _launch(gpu, block_m, block_n, block_d, 0, num_stages)
                    yield from warps({**launch, "TMA": tma, "SPECIALIZE": specialize}, 4, 8)


def _decode_candidates(gpu: GPU, block_d: int, itemsize: int, paged: int, quantized: int) -> Iterator[dict[str, Any]]:
    for block_n in (16, 32, 64, 128):
        for num_stages in (2, 3, 4):
            yield from warps(_launch(gpu, 16, block_n, block_d, 0, num_stages), 2, 4, 8)


_PREFILL_LAUNCHES = LaunchTable("attention_prefill", _shipped_prefill, _prefill_candidates)
_DECODE_LAUNCHES = LaunchTable("attention_decode", _shipped_decode, _decode_candidates)


def _decodes(T: int, G: int) -> bool:
    """Whether the decode kernel serves; one token always, because prefill would read k and v once for each query head."""
    return T * G <= DECODE_ROWS or T == 1


def _describable(*tensors: Tensor) -> bool:
    """Whether descriptors can say where these lie: the copy engine counts in 16 bytes."""
    return all(
        x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in x.stride()[:3]) and x.stride(-1) == 1
        for x in tensors
    )


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where a kernel writes its descriptors, 128 bytes each."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def refuse(q: Tensor, k: Tensor, v: Tensor, mask: Any, *_: object) -> str | None:
    B, H, _T, D = q.shape
    if D > MAX_D:
        return f"it holds head dims of up to {MAX_D}, not {D}"
    if max(B, H) > MAX_GRID:
        return f"it takes up to {MAX_GRID} sequences and heads"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1 and D != 1 and x.numel():
            return f"it reads heads whose last dim has stride 1; {name} has stride {x.stride(-1)}"
        if x.stride(2) >= MAX_STRIDE and x.shape[2] > 1:
            return f"it reads tokens that lie less than {MAX_STRIDE} elements apart; {name} has stride {x.stride(2)}"
    return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    kv_lens: Tensor | None,
    sinks: Tensor | None,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    B, H, T, D = q.shape
    Hk, S, page = k.shape[1], k.shape[2], 0
    if block_table is not None:
        page = S
        S = page * block_table.shape[1]
        if q.is_cpu:
            values.check_pages(block_table, kv_lens, k)
    # (B, T, H, D) in memory: the model's reshape to (B, T, H * D) is then free.
    o = _op.empty((B, T, H, D), dtype=q.dtype, device=q.device).transpose(1, 2)
    if not o.numel():
        return o
    if window is not None and window >= S + T:  # wider than any distance: no need for its comparisons, nor for 64 bits
        window = None
    if mask is not None:
        mask = mask.expand(B, H, T, S)
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    lens_stride = 0 if kv_lens is None else kv_lens.stride(0)
    sinks_stride = 0 if sinks is None else sinks.stride(0)
    additive = mask is not None and mask.dtype != torch.uint8
    # Where scores may stay q . k until the exp2, nothing is rounded before the difference is taken. c must be above 0: the
    # largest score is to have the largest exponent.
    scaled = softcap is not None or additive or scale <= 0.0
    numbers = (
        scale if softcap is None else scale / softcap,
        LOG2E if scaled else scale * LOG2E,
        softcap or 0.0,
        window or 0,
    )
    seen = {"CAUSAL": causal, "HAS_WINDOW": window is not None, "ADDITIVE": additive, "HAS_LENS": kv_lens is not None}
    scores = {"HAS_MASK": mask is not None, "SCALED": scaled, "HAS_SOFTCAP": softcap is not None}
    mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    cache = {"PAGE": page, "HAS_SCALES": k_scale is not None}
    cache_strides = (
        *((0, 0) if block_table is None else block_table.stride()),
        *((0, 0, 0) if k_scale is None else k_scale.stride()),
        *((0, 0, 0) if v_scale is None else v_scale.stride()),
    )
    with device_of(q):
        if _decodes(T, H // Hk):
            launch = _DECODE_LAUNCHES(q.device, _block_d(D), q.itemsize, int(page > 0), int(k_scale is not None))
            splits = max(1, triton.cdiv(S, SPLIT))  # of the shapes, never of kv_lens, so that a CUDA graph can hold the call
            tiles = triton.cdiv(T * (H // Hk), launch["BLOCK_M"])
            acc = _op.empty((B, H, T, splits, D), dtype=torch.float32, device=q.device)
            top = _op.empty((B, H, T, splits), dtype=torch.float32, device=q.device)
            total = _op.empty((B, H, T, splits), dtype=torch.float32, device=q.device)
            _attention_decode_kernel[(splits, Hk * tiles, B)](
                q, k, v, mask, kv_lens, block_table, k_scale, v_scale, acc, top, total, T, S, H, Hk, *numbers, *strides,
                *mask_strides, lens_stride, *cache_strides, D=D, SPLIT=SPLIT, **launch, **seen, **scores, **cache, **COMPILER,
            )  # fmt: skip
            block_d = min(launch["BLOCK_D"], REDUCE_D)
            _attention_reduce_kernel[(H * T, triton.cdiv(D, block_d), B)](
                acc, top, total, kv_lens, sinks, o, T, S, splits, window or 0, *o.stride()[:3], lens_stride, sinks_stride,
                D=D, SPLIT=SPLIT, SPLITS=SPLITS, BLOCK_D=block_d, HAS_SINKS=sinks is not None, **seen, num_warps=1, **COMPILER,
            )  # fmt: skip
        else:
            has = int(mask is not None), int(window is not None), int(k_scale is not None)
            launch = _PREFILL_LAUNCHES(q.device, _block_d(D), q.itemsize, *has)
            if launch["TMA"] and (page or not _describable(k, v)):
                launch = {**launch, "TMA": 0, "SPECIALIZE": 0}
            if launch["TMA"]:
                triton.set_allocator(_scratch)
            _attention_prefill_kernel[(triton.cdiv(T, launch["BLOCK_M"]), H, B)](
                q, k, v, mask, kv_lens, sinks, block_table, k_scale, v_scale, o, T, S, H // Hk, *numbers, *strides,
                *o.stride()[:3], *mask_strides, lens_stride, sinks_stride, *cache_strides,
                D=D, HAS_SINKS=sinks is not None, **launch, **seen, **scores, **cache, **COMPILER,
            )  # fmt: skip
    return o


# What a launch has that a plain one lacks: types of arguments, then constants. Strides that models make 1 are constants.
_FEATURES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "boolean mask": (
        {"mask_ptr": "*u8", **dict.fromkeys(("stride_mb", "stride_mh", "stride_mt"), "i32")},
        {"HAS_MASK": True, "stride_ms": 1},
    ),
    "additive mask": (
        {"mask_ptr": "*fp32", **dict.fromkeys(("stride_mb", "stride_mh", "stride_mt"), "i32")},
        {"HAS_MASK": True, "ADDITIVE": True, "SCALED": True, "stride_ms": 1},
    ),
    "window": ({}, {"HAS_WINDOW": True}),
    "softcap": ({}, {"HAS_SOFTCAP": True, "SCALED": True}),
    "kv_lens": ({"lens_ptr": "*i64"}, {"HAS_LENS": True, "stride_lens": 1}),
    "sinks": ({"sinks_ptr": "*fp32"}, {"HAS_SINKS": True, "stride_sinks": 1}),
    "pages of 16": ({"table_ptr": "*i32", "stride_tb": "i32"}, {"PAGE": 16, "stride_tp": 1}),
    "pages of 64": ({"table_ptr": "*i32", "stride_tb": "i32"}, {"PAGE": 64, "stride_tp": 1}),
    "int8": (
        {
            **{"k_ptr": "*i8", "v_ptr": "*i8", "k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32"},
            **{f"stride_{x}_scale_{dim}": "i32" for x in "kv" for dim in "bh"},
        },
        {"HAS_SCALES": True, "stride_k_scale_s": 1, "stride_v_scale_s": 1},
    ),
}
_VARIANTS = (
    *((feature,) for feature in ("boolean mask", "additive mask", "window", "softcap", "kv_lens", "sinks", "int8")),
    *(("kv_lens", "pages of 16"), ("kv_lens", "pages of 64"), ("kv_lens", "pages of 16", "int8")),
)
_PAIRS = (("window", "softcap"), ("window", "sinks"), ("kv_lens", "pages of 64", "int8"))  # of Gemma 2, GPT-OSS


def builds(gpu: GPU) -> Iterator[Build]:
    """Plain launches at every head dim; those with features, and the pairs that models and caches have, at the common two.
    fp16 differs from bf16 in conversions alone: its one variant is int8."""
    launches: dict[Any, Build] = {}  # variants share the reduction
    for dtype, dims, variants in (
        ("bf16", (64, 80, 96, 128, 256), (*_VARIANTS, *_PAIRS)),
        ("fp16", (64, 128, 256), (("int8",),)),
        ("fp32", (64, 80, 128, 256), _VARIANTS),
    ):
        for D in dims:
            for causal in (True,) if dtype == "fp16" else (True, False):
                _launches(gpu, launches, dtype, D, causal, ())
        for variant in variants:
            for D in (64, 128):
                _launches(gpu, launches, dtype, D, True, variant)
    yield from launches.values()


def _launches(gpu: GPU, found: dict[Any, Build], dtype: str, D: int, causal: bool, features: tuple[str, ...]) -> None:
    """Adds the launches of one call's three kernels that are not there yet."""
    strides = [f"stride_{x}{dim}" for x in "kv" for dim in "bhs"]
    strides += [f"stride_{x}{dim}" for x in "qo" for dim in "bht"]
    types = {
        **{f"{x}_ptr": f"*{dtype}" for x in "qkvo"},
        **dict.fromkeys(("acc_ptr", "top_ptr", "total_ptr"), "*fp32"),
        **dict.fromkeys(("T", "S", "G", "H", "Hk", "splits", "window", *strides), "i32"),
        **dict.fromkeys(("factor", "c", "softcap"), "fp32"),
    }
    constants: dict[str, Any] = {
        **dict.fromkeys(("HAS_WINDOW", "HAS_MASK", "ADDITIVE", "SCALED", "HAS_SOFTCAP", "HAS_LENS", "HAS_SINKS"), False),
        **{f"stride_m{dim}": 0 for dim in "bhts"},
        **{f"stride_{x}_scale_{dim}": 0 for x in "kv" for dim in "bhs"},
        **{"stride_lens": 0, "stride_sinks": 0, "stride_tb": 0, "stride_tp": 0, "PAGE": 0, "HAS_SCALES": False},
        **{"D": D, "CAUSAL": causal, "SPLIT": SPLIT, "SPLITS": SPLITS},
    }
    for feature in features:
        more, flags = _FEATURES[feature]
        types |= more
        constants |= flags
    itemsize = 4 if dtype == "fp32" else 2
    size = _block_d(D), itemsize
    has = (int(constants[name]) for name in ("HAS_MASK", "HAS_WINDOW", "HAS_SCALES"))
    decode = _shipped_decode(gpu, *size, int(constants["PAGE"] > 0), int(constants["HAS_SCALES"]))
    for kind, kernel, launch in (
        ("prefill", _attention_prefill_kernel, _shipped_prefill(gpu, *size, *has)),
        ("decode", _attention_decode_kernel, decode),
        ("reduce", _attention_reduce_kernel, {"BLOCK_D": min(decode["BLOCK_D"], REDUCE_D), "num_warps": 1}),
    ):
        arguments = kernel.arg_names
        signature = {name: kind for name, kind in types.items() if name in arguments}
        fixed = {name: x for name, x in constants.items() if name in arguments and name not in signature}
        name = ", ".join([f"{kind} D={D} {dtype}{' causal' if causal else ''}", *features])
        matrix = dtype != "fp32" and kind != "reduce"
        aligned = tuple(stride for stride in strides if stride in arguments)
        key = (kind, *signature.items(), *fixed.items(), *launch.items())
        found.setdefault(key, Build(kernel, name, signature, fixed, launch, matrix, aligned))
