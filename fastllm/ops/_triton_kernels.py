"""Device functions that several ops' Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

from ..quant.rounding import TINY

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: beside it an fp32 has no fraction left, so adding it rounds half to even
SMALLEST = tl.constexpr(TINY)


@triton.jit
def row_start(row, n1, n2, s0, s1, s2):
    """Where row r of ``_triton.Rows`` starts, in elements."""
    row = row.to(tl.int64)  # a tensor may have more than 2^31 elements
    return row // n2 // n1 * s0 + row // n2 % n1 * s1 + row % n2 * s2


@triton.jit
def quantized_base(n, N, LINES):
    """Where row n of a ``QuantizedTensor`` in layout "x16" starts: blocks of 16 rows hold LINES lines of one element a row
    (dwords of the data, groups of the scale). Rows past the last block are read as rows of it: no mask, and no harm."""
    block = tl.minimum(n // 16, (N - 1) // 16)
    return block.to(tl.int64) * LINES * 16 + n % 16


@triton.jit
def quantized_column(dwords, zero, c: tl.constexpr, BITS: tl.constexpr):
    """q - zero of column c of each dword of the "x16" layout, in fp32 and exact.

    The integer is put into the mantissa of 2^23 where it lies, if that is below bit 16, so that one instruction masks it, one
    scales it and subtracts; a conversion would run at half their rate, and a shift would come before it.
    """
    SHIFT: tl.constexpr = 8 * (c % 4) + 4 * (c // 4)
    LOW: tl.constexpr = SHIFT % 16
    if SHIFT >= 16:
        dwords = dwords >> 16
    q = (dwords & (((1 << BITS) - 1) << LOW)) | 0x4B000000
    step = tl.full(dwords.shape, 1.0 / (1 << LOW), tl.float32)
    start = tl.full(dwords.shape, 8388608.0 / (1 << LOW), tl.float32) + zero
    return tl.fma(q.to(tl.float32, bitcast=True), step, -start)


@triton.jit
def int8_scale(amax, finite):
    """Of rows of which the largest magnitude is amax: a step's worth, and its inverse, 0 where a row rounds to zeros. A GPU's
    maximum drops NaN: ``finite`` is to be asked of each element."""
    usable = finite & (amax >= SMALLEST)
    steps = tl.full(amax.shape, 127.0, tl.float32)
    inverse = tl.where(usable, tl.div_rn(steps, tl.where(usable, amax, 1.0)), 0.0)
    return tl.where(usable, tl.div_rn(amax, steps), tl.where(finite, 0.0, float("nan"))), inverse


@triton.jit
def int8_round(x, inverse):
    """Integers, as fp32. ``inverse`` broadcasts to x."""
    # fma rather than *: a compiler that fuses the product with the sum that rounds it would round once, not twice.
    q = tl.fma(tl.where(inverse != 0.0, x, 0.0), tl.broadcast_to(inverse, x.shape), tl.zeros(x.shape, tl.float32))
    return (q + ROUND) - ROUND


@triton.jit
def store_int8_groups(data_ptr, groups_ptr, row, first, y, inside, K, GROUP: tl.constexpr):
    """y (M, BLOCK) in fp32, columns first, first + 1, ... of rows ``row`` (M,) that are ``inside`` (M, 1), as int8 (rows, K) and, for
    each GROUP columns, its scale and the sum of its integers, (rows, ceil(K / GROUP), 2). Columns past K have to be 0."""
    COUNT: tl.constexpr = y.shape[1] // GROUP
    grouped = tl.reshape(y, [y.shape[0], COUNT, GROUP])
    size = tl.abs(grouped)
    # Asked of each element: a GPU's maximum drops NaN.
    finite = tl.min((size < float("inf")).to(tl.int32), 2) != 0
    scale, inverse = int8_scale(tl.where(finite, tl.max(size, 2), 1.0), finite)
    q = int8_round(grouped, inverse[:, :, None])
    k = first + tl.arange(0, y.shape[1])[None, :]
    tl.store(data_ptr + (row * K)[:, None] + k, tl.reshape(q, y.shape).to(tl.int8), mask=inside & (k < K))
    groups = tl.cdiv(K, GROUP)
    group = first // GROUP + tl.arange(0, COUNT)[None, :]
    at = ((row * groups)[:, None] + group) * 2
    both = tl.arange(0, 2)[None, None, :]
    there = inside & (group < groups)
    tl.store(groups_ptr + at[:, :, None] + both, tl.join(scale, tl.sum(q, 2)), mask=there[:, :, None])


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """1 - 2 / (e^2|x| + 1), safe where e^2|x| is infinite; its error is absolute, so that fp32 takes Cephes' polynomial for
    small x."""
    magnitude = tl.abs(x)
    y = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
    y = tl.where(x < 0.0, -y, y)
    if PRECISE:
        s = x * x
        p = (((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1) * s - 3.33332819422e-1
        y = tl.where(magnitude < 0.625, x + x * (s * p), y)
    return y
