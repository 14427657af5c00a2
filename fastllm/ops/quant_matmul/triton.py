"""quant_matmul in Triton: weights are read as stored, 4 or 8 bits each, and widened in registers.

Cost: N K bits / 8 bytes of weights and their scales, M K elements read and M N written; 2 M N K operations, and about 4
instructions a weight to widen it, once for each tile of BLOCK_M rows. Few rows are bound by the weights' bytes: on an H200,
whose memory reads at about 4.3 TB/s, 1 x 16384 x 2048 in int4 g32 (21 MB) takes 5 us at best. Many rows are bound by the
matrix units: 512 x 16384 x 2048 is 34 GFLOP, 43 us at the 790 TFLOP/s that bf16 reaches there.

The weight is the left operand, so that a tile is (BLOCK_N, columns) @ (columns, BLOCK_M): matrix instructions take their left
operand from registers, where the widened weight lies, and their narrow side is the one that few rows fill. A dword of the
"x16" layout holds 8 columns of a row (4 with 8 bits). Column c of BLOCK_I dwords is an operand of its own, multiplied by the
activations' columns 8 i + c: nothing is moved between threads to unpack. One row (M = 1) needs no matrix unit; sums of products
per thread spare the operand's rounding and its way through shared memory. With few tiles, K is split; partial sums are
added in a fixed order by a second kernel, so the same arguments give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...backends import forced_backend
from ...quant.activations import activation_group
from .. import _op
from .._launch import GPU, LaunchTable, warps
from .._triton import COMPILER, Build, device_of, power_of_two, rows
from .._triton_kernels import quantized_base, quantized_column, row_start, store_int8_groups

FEW = 16  # rows up to which a tile has 16 of them
ROOMY = 160 << 10  # bytes of shared memory a block: NVIDIA's data centre GPUs have them; the others have 100 KiB, AMD's 64
PROGRAMS = 256  # two a multiprocessor, on GPUs of about 130: below this K is split
SUM_BLOCK = 1024
DENSE_LINES = 32  # of a program that dequantises: 4 to 8 elements a thread and row
# Rows, by bytes of an element, from which writing the weight out for cuBLAS is expected to pay. In bf16 that moves 4.5 bytes a
# weight, 61 us for 14336 x 4096 at 4.3 TB/s, against 150 us of product at 1024 rows and 790 TFLOP/s; the fused kernel widens
# each weight again for every 128 rows. fp32 has no matrix instruction to lose. Estimates: `fastllm bench --backend torch,triton`
# on a GPU compares the two.
DENSE_ROWS = {2: 1024, 4: 128}

# ---------------------------------------------------------------- float activations


@triton.jit
def _scales(scale_row, minimum_row, i, inside, GROUP_LINES: tl.constexpr, HAS_MINIMUM: tl.constexpr):
    """fp32 scale and minimum of lines i, (BLOCK_N, BLOCK_I), or (BLOCK_N, 1) where a row is one group."""
    if GROUP_LINES == 0:
        scale = tl.load(scale_row).to(tl.float32)
        minimum = tl.load(minimum_row).to(tl.float32) if HAS_MINIMUM else scale
    else:
        at = (i // GROUP_LINES * 16)[None, :]
        scale = tl.load(scale_row + at, mask=inside[None, :], other=0.0).to(tl.float32)
        minimum = tl.load(minimum_row + at, mask=inside[None, :], other=0.0).to(tl.float32) if HAS_MINIMUM else scale
    return scale, minimum


@triton.jit
def _weight(dwords, scale, minimum, zero, c: tl.constexpr, BITS: tl.constexpr, HAS_MINIMUM: tl.constexpr):
    """w = (q - zero) * scale + minimum of column c of each dword, in fp32."""
    q = quantized_column(dwords, zero, c, BITS)
    return tl.fma(q, scale, minimum) if HAS_MINIMUM else q * scale


@triton.jit
def _store(acc, bias_ptr, y_ptr, m, n, M, N, HAS_BIAS: tl.constexpr):
    """The tile (BLOCK_N, BLOCK_M) of sums as rows of y, or of one split's partial sums."""
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    y = tl.trans(acc).to(y_ptr.dtype.element_ty)
    at = tl.program_id(2).to(tl.int64) * M * N + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptr + at, y, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _arrange_fwd_kernel(
    x_ptr, out_ptr, M, K, LINES, x_n1, x_n2, x_s0, x_s1, x_s2,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x (M, K) -> (COLUMNS, M, LINES): the operand of column c lies in one piece, columns past K are 0."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    x_at = row_start(m, x_n1, x_n2, x_s0, x_s1, x_s2)[:, None]
    out = m.to(tl.int64)[:, None] * LINES + i[None, :]
    mask = (m < M)[:, None] & (i < LINES)[None, :]
    for c in tl.static_range(COLUMNS):
        k = i * COLUMNS + c
        x = tl.load(x_ptr + x_at + k[None, :], mask=mask & (k < K)[None, :], other=0.0)
        tl.store(out_ptr + out, x, mask=mask)
        out_ptr += tl.cast(LINES, tl.int64) * M


@triton.jit
def _matvec_fwd_kernel(
    x_ptr, w_ptr, scale_ptr, minimum_ptr, bias_ptr, y_ptr,
    N, K, LINES, GROUPS, zero,
    BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BITS: tl.constexpr, GROUP_LINES: tl.constexpr,
    HAS_MINIMUM: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """One row: each thread sums products of its own dwords, in fp32; the threads' sums are added at the end."""
    COLUMNS: tl.constexpr = 32 // BITS
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w_row = w_ptr + quantized_base(n, N, LINES)[:, None]
    scale_row = scale_ptr + quantized_base(n, N, GROUPS)[:, None]
    minimum_row = minimum_ptr + quantized_base(n, N, GROUPS)[:, None] if HAS_MINIMUM else scale_row
    acc = tl.zeros([BLOCK_N, BLOCK_I], tl.float32)
    for start in range(0, LINES, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        inside = i < LINES
        dwords = tl.load(w_row + (i * 16)[None, :], mask=inside[None, :], other=0)
        scale, minimum = _scales(scale_row, minimum_row, i, inside, GROUP_LINES, HAS_MINIMUM)
        for c in tl.static_range(COLUMNS):
            k = i * COLUMNS + c
            x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            acc = tl.fma(_weight(dwords, scale, minimum, zero, c, BITS, HAS_MINIMUM), x[None, :], acc)
    y = tl.sum(acc, 1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _quant_matmul_fwd_kernel(
    x_ptr, w_ptr, scale_ptr, minimum_ptr, bias_ptr, y_ptr,
    M, N, K, LINES, GROUPS, zero, split_lines,
    x_n1, x_n2, x_s0, x_s1, x_s2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BITS: tl.constexpr, GROUP_LINES: tl.constexpr,
    ARRANGED: tl.constexpr, HAS_MINIMUM: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = 32 // BITS
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if ARRANGED:
        x_row = x_ptr + (m.to(tl.int64) * LINES)[None, :]
    else:
        x_row = x_ptr + row_start(m, x_n1, x_n2, x_s0, x_s1, x_s2)[None, :]
    w_row = w_ptr + quantized_base(n, N, LINES)[:, None]
    scale_row = scale_ptr + quantized_base(n, N, GROUPS)[:, None]
    minimum_row = minimum_ptr + quantized_base(n, N, GROUPS)[:, None] if HAS_MINIMUM else scale_row
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first = tl.program_id(2) * split_lines
    for start in range(first, min(first + split_lines, LINES), BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        inside = i < LINES
        dwords = tl.load(w_row + (i * 16)[None, :], mask=inside[None, :], other=0)
        scale, minimum = _scales(scale_row, minimum_row, i, inside, GROUP_LINES, HAS_MINIMUM)
        # fp32 has nothing to spare: sums of 128 columns, then their sum, lose less than one long sum.
        part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32) if x_ptr.dtype.element_ty == tl.float32 else acc
        for c in tl.static_range(COLUMNS):
            if ARRANGED:
                at = c * tl.cast(LINES, tl.int64) * M  # the cast of an argument that is 1, and so constant, needs a function
                x = tl.load(x_row + at + i[:, None], mask=inside[:, None] & (m < M)[None, :], other=0.0)
            else:
                k = i * COLUMNS + c
                x = tl.load(x_row + k[:, None], mask=(k < K)[:, None] & (m < M)[None, :], other=0.0)
            w = _weight(dwords, scale, minimum, zero, c, BITS, HAS_MINIMUM).to(x.dtype)
            part = tl.dot(w, x, part, input_precision="ieee")
        acc = acc + part if x_ptr.dtype.element_ty == tl.float32 else part
    _store(acc, bias_ptr, y_ptr, m, n, M, N, HAS_BIAS)


@triton.jit
def _add_splits_fwd_kernel(
    part_ptr, bias_ptr, y_ptr, N, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        y += tl.load(part_ptr + tl.cast(size, tl.int64) * split + at, mask=at < size, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + at % N, mask=at < size, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def _dequantize_fwd_kernel(
    w_ptr, scale_ptr, minimum_ptr, out_ptr, N, K, LINES, GROUPS, zero,
    BLOCK_I: tl.constexpr, BITS: tl.constexpr, GROUP_LINES: tl.constexpr, HAS_MINIMUM: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_I dwords of 16 rows, written as rows of K elements."""
    COLUMNS: tl.constexpr = 32 // BITS
    n = tl.program_id(0) * 16 + tl.arange(0, 16)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = i < LINES
    dwords = tl.load(w_ptr + quantized_base(n, N, LINES)[:, None] + (i * 16)[None, :], mask=inside[None, :], other=0)
    scale_row = scale_ptr + quantized_base(n, N, GROUPS)[:, None]
    minimum_row = minimum_ptr + quantized_base(n, N, GROUPS)[:, None] if HAS_MINIMUM else scale_row
    s, m = _scales(scale_row, minimum_row, i, inside, GROUP_LINES, HAS_MINIMUM)
    # Joined by the highest bit of the column's number first, the last dim is the column: a thread writes neighbours.
    w0, w2 = _weight(dwords, s, m, zero, 0, BITS, HAS_MINIMUM), _weight(dwords, s, m, zero, 2, BITS, HAS_MINIMUM)
    w1, w3 = _weight(dwords, s, m, zero, 1, BITS, HAS_MINIMUM), _weight(dwords, s, m, zero, 3, BITS, HAS_MINIMUM)
    if BITS == 4:
        w0 = tl.join(w0, _weight(dwords, s, m, zero, 4, BITS, HAS_MINIMUM))
        w1 = tl.join(w1, _weight(dwords, s, m, zero, 5, BITS, HAS_MINIMUM))
        w2 = tl.join(w2, _weight(dwords, s, m, zero, 6, BITS, HAS_MINIMUM))
        w3 = tl.join(w3, _weight(dwords, s, m, zero, 7, BITS, HAS_MINIMUM))
    w = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape([16, BLOCK_I * COLUMNS])
    k = tl.program_id(1) * BLOCK_I * COLUMNS + tl.arange(0, BLOCK_I * COLUMNS)
    at = n.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(out_ptr + at, w.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


# ---------------------------------------------------------------- int8 activations


@triton.jit
def _quantize_fwd_kernel(
    x_ptr, q_ptr, groups_ptr, M, K, STEPS, x_n1, x_n2, x_s0, x_s1, x_s2,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Integers (M, STEPS * BLOCK_K), and for each group of BLOCK_K columns its scale and their sum, (M, STEPS, 2)."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_K
    k = first + tl.arange(0, BLOCK_K)
    x_at = row_start(m, x_n1, x_n2, x_s0, x_s1, x_s2)[:, None]
    inside = (m < M)[:, None]
    x = tl.load(x_ptr + x_at + k[None, :], mask=inside & (k < K)[None, :], other=0.0).to(tl.float32)
    store_int8_groups(q_ptr, groups_ptr, m.to(tl.int64), first, x, inside, STEPS * BLOCK_K, BLOCK_K)


@triton.jit
def _quant_matmul_int8_fwd_kernel(
    q_ptr, x_groups_ptr, w_ptr, scale_ptr, minimum_ptr, bias_ptr, y_ptr,
    M, N, K, LINES, GROUPS, STEPS, zero, split_steps, stride_xm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BITS: tl.constexpr, GROUP_STEPS: tl.constexpr,
    HAS_MINIMUM: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """With u = q - center, an int8, and offset = minimum + (center - zero) * scale, w = u * scale + offset. A step is one group of
    activations xq * sx:  y += sum(u xq) * (scale * sx) + offset * (sx * sum(xq)), the first sum exact in int32.

    Integers are (M, K); groups (M, STEPS, 2) are scale and sum, as rms_norm_int8 and gated_activation_int8 write them."""
    COLUMNS: tl.constexpr = 32 // BITS
    CENTER: tl.constexpr = 1 << (BITS - 1)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_row = q_ptr + (m.to(tl.int64) * stride_xm)[None, :]
    x_groups = x_groups_ptr + m.to(tl.int64) * STEPS * 2
    w_row = w_ptr + quantized_base(n, N, LINES)[:, None] * 4
    scale_row = scale_ptr + quantized_base(n, N, GROUPS)
    minimum_row = minimum_ptr + quantized_base(n, N, GROUPS) if HAS_MINIMUM else scale_row
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first = tl.program_id(2) * split_steps
    for step in range(first, min(first + split_steps, STEPS)):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        w = tl.load(w_row + (k // COLUMNS * 64 + k % 4)[None, :], mask=(k // COLUMNS < LINES)[None, :], other=0)
        if BITS == 4:
            w = (w >> (k // 4 % 2 * 4).to(tl.uint8)[None, :]) & 15
        w = (w.to(tl.int16) - CENTER).to(tl.int8)
        x = tl.load(x_row + k[:, None], mask=(k < K)[:, None] & (m < M)[None, :], other=0)
        x_scale = tl.load(x_groups + step * 2, mask=m < M, other=0.0)
        group = step // GROUP_STEPS * 16 if GROUP_STEPS else 0
        scale = tl.load(scale_row + group).to(tl.float32)
        acc = tl.fma(tl.dot(w, x).to(tl.float32), scale[:, None] * x_scale[None, :], acc)
        if HAS_OFFSET:
            offset = (CENTER - zero) * scale
            if HAS_MINIMUM:
                offset += tl.load(minimum_row + group).to(tl.float32)
            x_sum = x_scale * tl.load(x_groups + step * 2 + 1, mask=m < M, other=0.0)
            acc = tl.fma(offset[:, None] + tl.zeros_like(acc), x_sum[None, :], acc)
    _store(acc, bias_ptr, y_ptr, m, n, M, N, HAS_BIAS)


# ---------------------------------------------------------------- launches


def _shipped_matvec(gpu: GPU, lines: int) -> dict[str, Any]:
    """16 rows of the weight a program, 64 bytes a thread: some 20 KB are on their way into each multiprocessor."""
    block_i = min(max(lines, 32), 256)
    return {"BLOCK_N": 16, "BLOCK_I": block_i, "num_warps": block_i // 32}


def _matvec_candidates(gpu: GPU, lines: int) -> Iterator[dict[str, Any]]:
    for block_i in (64, 128, 256, 512):
        if block_i <= max(lines, 32):
            yield from warps({"BLOCK_N": 16, "BLOCK_I": block_i, "num_warps": 0}, block_i // 64, block_i // 32)


def _bucket(M: int) -> int:
    """Which numbers of rows share a launch: up to 16, up to 64, and then powers of two up to 4096 or more."""
    return FEW if M <= FEW else 64 if M <= 64 else min(power_of_two(M), 4096)


def _shipped(gpu: GPU, rows: int, itemsize: int, bits: int) -> dict[str, Any]:
    """Tiles of 128 columns of K. fp32 has no exact matrix instruction, so that its tiles must fit a thread's registers twice."""
    block_i = 128 * bits // 32
    if rows <= FEW:
        return {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_I": block_i, "num_warps": 4, "num_stages": 3}
    if itemsize == 4:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_I": 16, "num_warps": 8, "num_stages": 2}
    if rows <= 64:  # 8 bits: twice the dwords and, in groups of 32, as many scales; 4 warps would spill
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_I": block_i, "num_warps": bits, "num_stages": 3}
    if gpu.shared_bytes >= ROOMY:
        return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_I": block_i, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_I": block_i, "num_warps": 8, "num_stages": 3 if bits == 4 else 2}


def _candidates(gpu: GPU, rows: int, itemsize: int, bits: int) -> Iterator[dict[str, Any]]:
    base = _shipped(gpu, rows, itemsize, bits)
    for block_n in (32, 64, 128, 256):
        for stages in (2, 3, 4):
            yield from warps({**base, "BLOCK_N": block_n, "num_stages": stages, "num_warps": 0}, 4, 8)


def _shipped_int8(gpu: GPU, rows: int, group: int) -> dict[str, Any]:
    """Two sums an element are held, a group's and the whole: 128 x 128 of them would leave too few registers for scales."""
    if rows <= FEW:
        return {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": group, "num_warps": 4, "num_stages": 4}
    if rows <= 64:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": group, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": group, "num_warps": 8, "num_stages": 3}


def _int8_candidates(gpu: GPU, rows: int, group: int) -> Iterator[dict[str, Any]]:
    base = _shipped_int8(gpu, rows, group)
    for block_n in (32, 64, 128):
        for stages in (2, 3, 4):
            yield from warps({**base, "BLOCK_N": block_n, "num_stages": stages, "num_warps": 0}, 4, 8)


_MATVEC_LAUNCHES = LaunchTable("quant_matvec", _shipped_matvec, _matvec_candidates)
_LAUNCHES = LaunchTable("quant_matmul", _shipped, _candidates)
_INT8_LAUNCHES = LaunchTable("quant_matmul_int8", _shipped_int8, _int8_candidates)


def _splits(tiles: int, steps: int) -> tuple[int, int]:
    """Into how many parts K's steps are split and how many each part gets: four at least, to be worth the partial sums."""
    splits = 1
    while splits < 8 and tiles * splits * 2 <= PROGRAMS and steps >= splits * 8:
        splits *= 2
    each = triton.cdiv(steps, splits)
    return triton.cdiv(steps, each), each


def refuse(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bias: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    zero: int,
    layout: str,
    *_: object,
) -> str | None:
    if x.stride(-1) != 1 and k != 1:
        return "it reads rows whose last dim has stride 1"
    if bias is not None and bias.stride(0) != 1 and n != 1:
        return "it reads a bias of stride 1"
    if layout != "x16":
        return f"it reads weights in layout 'x16', not '{layout}'; pack() them"
    if data.storage_offset() % 64:
        return "it reads weights that start on a 64-byte boundary"
    if rows(x) is None:
        return "it reads rows that lie in at most three strided dims"
    return None


def quant_matmul(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bias: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    zero: int,
    layout: str,
    int8_activations: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """dtype: of y, where it is not x's: cross_entropy does not want its logits rounded."""
    y = _op.empty((*x.shape[:-1], n), dtype=dtype or x.dtype, device=x.device)
    if y.numel():
        with device_of(x):
            (_int8 if int8_activations else _float)(x, data, scale, minimum, bias, y, n, k, bits, group_size, zero)
    return y


def refuse_int8(x: Tensor, x_groups: Tensor, *args: Any) -> str | None:
    at = rows(x)
    if at is None or not at.evenly or not x_groups.is_contiguous():
        return "it reads integers whose rows lie at one stride, and groups that lie in one piece"
    return refuse(x, *args)


def quant_matmul_int8(
    x: Tensor,
    x_groups: Tensor,
    data: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bias: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    zero: int,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    y = _op.empty((*x.shape[:-1], n), dtype=dtype, device=x.device)
    if y.numel():
        with device_of(x):
            _int8_product(x, x_groups, data, scale, minimum, bias, y, n, k, bits, group_size, zero)
    return y


def refuse_dequantized(x: Tensor, *args: Any) -> str | None:
    if args[-1]:
        return "PyTorch's product takes activations as they are, not in int8"
    least, M = DENSE_ROWS[x.element_size()], x.numel() // max(x.shape[-1], 1)
    if least > M and forced_backend() != "torch":
        return f"below {least} rows the fused kernel reads fewer bytes in less time than dequantising would take"
    return refuse(x, *args)


def dequantized_matmul(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bias: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    zero: int,
    layout: str,
    int8_activations: bool,
) -> Tensor:
    """The weight written out in x's dtype by our kernel, then PyTorch's own product (cuBLAS), at N K more elements of memory."""
    w, columns = _op.empty((n, k), dtype=x.dtype, device=x.device), 32 // bits
    if w.numel():
        lines = data.shape[1]
        with device_of(x):
            _dequantize_fwd_kernel[(triton.cdiv(n, 16), triton.cdiv(lines, DENSE_LINES))](
                data.view(torch.int32), scale, minimum, w, n, k, lines, scale.shape[1], float(zero),
                BLOCK_I=DENSE_LINES, BITS=bits, GROUP_LINES=0 if scale.shape[1] == 1 else group_size // columns,
                HAS_MINIMUM=minimum is not None, num_warps=4, **COMPILER,
            )  # fmt: skip
    return torch.nn.functional.linear(x, w, bias)


def _float(
    x: Tensor, data: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None, y: Tensor,
    N: int, K: int, bits: int, group_size: int, zero: int,
) -> None:  # fmt: skip
    at, columns = rows(x), 32 // bits
    assert at is not None  # refuse() has looked
    M, lines, dwords = at.count, data.shape[1], data.view(torch.int32)
    form: dict[str, Any] = {
        "BITS": bits, "GROUP_LINES": 0 if scale.shape[1] == 1 else group_size // columns,
        "HAS_MINIMUM": minimum is not None,
    }  # fmt: skip
    if M == 1:
        launch = _MATVEC_LAUNCHES(x.device, power_of_two(lines))
        _matvec_fwd_kernel[(triton.cdiv(N, launch["BLOCK_N"]),)](
            x, dwords, scale, minimum, bias, y, N, K, lines, scale.shape[1], float(zero),
            HAS_BIAS=bias is not None, **form, **launch, **COMPILER,
        )  # fmt: skip
        return
    launch = _LAUNCHES(x.device, _bucket(M), x.element_size(), bits)
    tiles = triton.cdiv(M, launch["BLOCK_M"]), triton.cdiv(N, launch["BLOCK_N"])
    splits, each = _splits(tiles[0] * tiles[1], triton.cdiv(lines, launch["BLOCK_I"]))
    # Column c's activations lie COLUMNS elements apart: many rows are read often enough to be put side by side first.
    arranged = M > FEW
    if arranged:
        side_by_side = _op.empty((columns, M, lines), dtype=x.dtype, device=x.device)
        _arrange_fwd_kernel[(triton.cdiv(M, 16), triton.cdiv(lines, 64))](
            x, side_by_side, M, K, lines, *at.args, BLOCK_M=16, BLOCK_I=64, COLUMNS=columns, num_warps=4, **COMPILER
        )
        x = side_by_side
    out = y if splits == 1 else _op.empty((splits, M, N), dtype=torch.float32, device=x.device)
    grid = (*tiles, splits)
    _quant_matmul_fwd_kernel[grid](
        x, dwords, scale, minimum, bias, out, M, N, K, lines, scale.shape[1], float(zero), each * launch["BLOCK_I"], *at.args,
        ARRANGED=arranged, HAS_BIAS=bias is not None and splits == 1, **form, **launch, **COMPILER,
    )  # fmt: skip
    _add_splits(out, bias, y, splits, N)


def _add_splits(parts: Tensor, bias: Tensor | None, y: Tensor, splits: int, N: int) -> None:
    if splits > 1:
        size = y.numel()
        _add_splits_fwd_kernel[(triton.cdiv(size, SUM_BLOCK),)](
            parts, bias, y, N, size, SPLITS=splits, BLOCK=SUM_BLOCK, HAS_BIAS=bias is not None, num_warps=4, **COMPILER
        )


def _int8(
    x: Tensor, data: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None, y: Tensor,
    N: int, K: int, bits: int, group_size: int, zero: int,
) -> None:  # fmt: skip
    at, group = rows(x), activation_group(group_size)
    assert at is not None
    M, steps = at.count, triton.cdiv(K, group)
    q = _op.empty((M, steps * group), dtype=torch.int8, device=x.device)
    groups = _op.empty((M, steps, 2), dtype=torch.float32, device=x.device)
    block_m = 2048 // group
    _quantize_fwd_kernel[(triton.cdiv(M, block_m), steps)](
        x, q, groups, M, K, steps, *at.args, BLOCK_M=block_m, BLOCK_K=group, num_warps=4, **COMPILER
    )
    _int8_product(q, groups, data, scale, minimum, bias, y, N, q.shape[1], bits, group_size, zero)


def _int8_product(
    x: Tensor, x_groups: Tensor, data: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None, y: Tensor,
    N: int, K: int, bits: int, group_size: int, zero: int,
) -> None:  # fmt: skip
    """x: integers (..., K), rows at one stride. K: of their rows, which may be padded to whole groups."""
    at, group = rows(x), activation_group(group_size)
    assert at is not None
    M, steps = at.count, triton.cdiv(K, group)
    launch = _INT8_LAUNCHES(x.device, _bucket(M), group)
    tiles = triton.cdiv(M, launch["BLOCK_M"]), triton.cdiv(N, launch["BLOCK_N"])
    splits, each = _splits(tiles[0] * tiles[1], steps)
    out = y if splits == 1 else _op.empty((splits, M, N), dtype=torch.float32, device=x.device)
    grid = (*tiles, splits)
    _quant_matmul_int8_fwd_kernel[grid](
        x, x_groups, data, scale, minimum, bias, out,
        M, N, K, data.shape[1], scale.shape[1], steps, float(zero), each, at.s2,
        BITS=bits, GROUP_STEPS=0 if scale.shape[1] == 1 else group_size // group,
        HAS_MINIMUM=minimum is not None, HAS_OFFSET=minimum is not None or zero != 1 << bits - 1,
        HAS_BIAS=bias is not None and splits == 1, **launch, **COMPILER,
    )  # fmt: skip
    _add_splits(out, bias, y, splits, N)


# ---------------------------------------------------------------- for `fastllm compile`


def builds(gpu: GPU) -> Iterator[Build]:
    """Llama-3.2-1B's and 8B's shapes (N, K) in the formats of Q4_1, Q4_0, Q8_0, GPTQ and of whole rows."""
    forms = (4, 32, True), (4, 64, False), (4, 128, True), (8, 32, False), (8, 128, True), (8, -1, False)
    for dtype in ("bf16", "fp16", "fp32"):
        for bits, group, minimum in forms:
            for M in (1, 16, 64, 512):
                yield from _float_builds(gpu, dtype, M, bits, group, minimum)
                if dtype == "bf16":  # int8 products see x's dtype in y's alone
                    yield from _int8_builds(gpu, M, bits, group, minimum)
        yield from _other_builds(dtype)
        for bits, group, minimum in forms:
            yield _dequantize_build(dtype, bits, group, minimum)


_ROWS = {f"x_{name}": "i32" for name in ("n1", "n2", "s0", "s1", "s2")}
_ALIGNED = ("N", "K", "LINES", "GROUPS", "split_lines", "x_s2")


def _float_builds(gpu: GPU, dtype: str, M: int, bits: int, group: int, minimum: bool) -> Iterator[Build]:
    columns = 32 // bits
    pointers = {"x_ptr": f"*{dtype}", "w_ptr": "*i32", "scale_ptr": "*fp16", "y_ptr": f"*{dtype}"}
    pointers |= {"minimum_ptr": "*fp16"} if minimum else {}
    numbers = {"N": "i32", "K": "i32", "LINES": "i32", "GROUPS": "i32", "zero": "fp32"}
    form: dict[str, Any] = {"BITS": bits, "GROUP_LINES": max(group, 0) // columns, "HAS_MINIMUM": minimum, "HAS_BIAS": False}
    form |= {"bias_ptr": None} | ({} if minimum else {"minimum_ptr": None})
    words = f"M={M} {dtype} int{bits} " + (f"g{group}" if group > 0 else "rows") + (" minimum" if minimum else "")
    if M == 1:
        for lines in (256, 72):  # K = 2048 (4 bits) and more; SmolLM2's 576
            name, launch = f"LINES={lines} {words}", _shipped_matvec(gpu, power_of_two(lines))
            yield Build(_matvec_fwd_kernel, name, {**pointers, **numbers}, form, launch, aligned=_ALIGNED)
        return
    launch = _shipped(gpu, _bucket(M), 4 if dtype == "fp32" else 2, bits)
    for partial in (False, True) if M <= 64 else (False,):
        signature = {**pointers, "M": "i32", **numbers, "split_lines": "i32", **_ROWS}
        signature |= {"y_ptr": "*fp32"} if partial else {}
        yield Build(
            _quant_matmul_fwd_kernel,
            words + (" split" if partial else ""),
            signature,
            {**form, "ARRANGED": M > FEW},
            launch,
            matrix=dtype != "fp32",
            aligned=_ALIGNED,
        )


def _dequantize_build(dtype: str, bits: int, group: int, minimum: bool) -> Build:
    pointers = {"w_ptr": "*i32", "scale_ptr": "*fp16", "out_ptr": f"*{dtype}"} | ({"minimum_ptr": "*fp16"} if minimum else {})
    form: dict[str, Any] = {"BITS": bits, "GROUP_LINES": max(group, 0) * bits // 32, "HAS_MINIMUM": minimum}
    return Build(
        _dequantize_fwd_kernel,
        f"{dtype} int{bits} " + (f"g{group}" if group > 0 else "rows") + (" minimum" if minimum else ""),
        {**pointers, "N": "i32", "K": "i32", "LINES": "i32", "GROUPS": "i32", "zero": "fp32"},
        form | ({} if minimum else {"minimum_ptr": None}),
        {"BLOCK_I": DENSE_LINES, "num_warps": 4},
        aligned=("N", "K", "LINES", "GROUPS"),
    )


def _int8_builds(gpu: GPU, M: int, bits: int, group: int, minimum: bool) -> Iterator[Build]:
    step = activation_group(group)
    launch = _shipped_int8(gpu, _bucket(M), step)
    pointers = {"q_ptr": "*i8", "x_groups_ptr": "*fp32", "w_ptr": "*u8", "scale_ptr": "*fp16"}
    pointers |= {"minimum_ptr": "*fp16"} if minimum else {}
    numbers: dict[str, str] = dict.fromkeys(("N", "K", "LINES", "GROUPS", "STEPS", "split_steps", "stride_xm"), "i32") | (
        {"M": "i32"} if M > 1 else {}
    )
    form: dict[str, Any] = {"BITS": bits, "GROUP_STEPS": max(group, 0) // step, "HAS_MINIMUM": minimum, "HAS_OFFSET": minimum}
    form |= {"HAS_BIAS": False, "bias_ptr": None} | ({} if minimum else {"minimum_ptr": None})
    form |= {} if M > 1 else {"M": 1}  # the launcher makes an argument of 1 a constant
    words = f"M={M} int{bits} " + (f"g{group}" if group > 0 else "rows") + (" minimum" if minimum else "")
    for y in ("bf16", "fp32"):  # fp32: partial sums too
        yield Build(
            _quant_matmul_int8_fwd_kernel,
            f"{words} to {y}",
            {**pointers, "y_ptr": f"*{y}", **numbers, "zero": "fp32"},
            form,
            launch,
            matrix=True,
            aligned=("N", "K", "LINES", "GROUPS", "STEPS", "stride_xm"),
        )


def _other_builds(dtype: str) -> Iterator[Build]:
    pointers = {"x_ptr": f"*{dtype}", "M": "i32", "K": "i32", **_ROWS}
    for columns in (4, 8):
        constants = {"BLOCK_M": 16, "BLOCK_I": 64, "COLUMNS": columns}
        signature = {**pointers, "out_ptr": f"*{dtype}", "LINES": "i32"}
        yield Build(_arrange_fwd_kernel, f"{columns} columns {dtype}", signature, constants, aligned=("K", "LINES", "x_s2"))
    for group in (32, 64, 128):
        signature = {**pointers, "q_ptr": "*i8", "groups_ptr": "*fp32", "STEPS": "i32"}
        constants = {"BLOCK_M": 2048 // group, "BLOCK_K": group}
        yield Build(_quantize_fwd_kernel, f"group {group} {dtype}", signature, constants, aligned=("K", "x_s2"))
    for splits in range(2, 9):
        signature = {"part_ptr": "*fp32", "y_ptr": f"*{dtype}", "N": "i32", "size": "i32"}
        sums = {"SPLITS": splits, "BLOCK": SUM_BLOCK, "HAS_BIAS": False, "bias_ptr": None}
        yield Build(_add_splits_fwd_kernel, f"{splits} splits {dtype}", signature, sums, aligned=("N", "size"))
