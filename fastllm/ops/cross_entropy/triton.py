"""cross_entropy in Triton: with a float weight the projection and the loss are one kernel, whose logits live in registers.

Cost: V K elements of the weight, read once by each of the M / BLOCK_M blocks of rows (which run side by side, so that L2 serves
all but the first), M K of hidden; 2 M V K flops and M V exponentials. At BLOCK_M = 128 in bf16 that is 128 flops a byte or more:
the matrix units are the limit. 512 x 49152 x 576 is 29 GFLOP, 37 us at the 790 TFLOP/s that bf16 reaches on an H200; the 100 MB
of fp32 logits that are not written and read again would alone take 47 us at its 4.3 TB/s. The vocabulary is split over
programs; each leaves a maximum and a sum of exponentials a row, which a second kernel adds up in a fixed order, so the same
arguments give the same bits.

A quantised weight's logits are quant_matmul's, 16 MiB of fp32 at a time, and go through the same online softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _op
from .._launch import GPU, LaunchTable, warps
from .._triton import COMPILER, Build, device_of, rows
from .._triton_kernels import row_start, tanh
from ..quant_matmul import triton as quant_matmul

HIGHEST = tl.constexpr(3.4028234663852886e38)  # the highest finite fp32
PROGRAMS = 256  # two a multiprocessor, on GPUs of about 130: into as many is the work split
FEW = 16  # rows up to which a tile has 16 of them

ROWS = 1024  # of a quantised weight's logits at a time
TILE = 1 << 22  # logits at a time: 16 MiB, which L2 holds until they have been reduced
PART = 4096  # logits of a row that one program reduces; stretches of the vocabulary are whole parts
BLOCK = 1024


@triton.jit
def _take(z, v, end, target, top, total, picked, softcap, HAS_SOFTCAP: tl.constexpr, PRECISE: tl.constexpr):
    """Adds the logits z (rows, BLOCK) of tokens v < end to (top, total, picked), the online softmax of each row.

    top stays among finite numbers, so that z - top is never inf - inf: a logit of +inf makes the total infinite, a row of
    -inf leaves it 0, and the logarithm says the rest. A maximum may drop NaN, the sum of exponentials does not.
    """
    if HAS_SOFTCAP:
        z = softcap * tanh(z / softcap, PRECISE)
    picked += tl.sum(tl.where(v[None, :] == target[:, None], z, 0.0), 1)  # one of them at most, so the sum is exact
    z = tl.where((v < end)[None, :], z, float("-inf"))
    new = tl.minimum(tl.maximum(top, tl.max(z, 1)), HIGHEST)
    total = total * tl.exp(top - new) + tl.sum(tl.exp(z - new[:, None]), 1)
    return new, total, picked


@triton.jit
def _leave(top_ptr, total_ptr, picked_ptr, part, m, M, target, first, end, top, total, picked):
    """A part's results, each (parts, M), and the target's logit (M,) from the part that has it."""
    at = part.to(tl.int64) * M + m
    tl.store(top_ptr + at, top, mask=m < M)
    tl.store(total_ptr + at, total, mask=m < M)
    tl.store(picked_ptr + m, picked, mask=(target >= first) & (target < end))


@triton.jit
def _cross_entropy_fwd_kernel(
    x_ptr, w_ptr, target_ptr, top_ptr, total_ptr, picked_ptr,
    M, V, K, softcap, split_tokens, stride_wv,
    x_n1, x_n2, x_s0, x_s1, x_s2,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_M rows of hidden, split_tokens of the vocabulary."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_row = x_ptr + row_start(m, x_n1, x_n2, x_s0, x_s1, x_s2)[:, None]
    target = tl.load(target_ptr + m, mask=m < M, other=-1)  # no part has it
    top = tl.full([BLOCK_M], -HIGHEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    picked = tl.zeros([BLOCK_M], tl.float32)
    first = tl.program_id(1) * split_tokens
    end = tl.minimum(first + split_tokens, V)
    for start in range(first, end, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        w_row = w_ptr + (v.to(tl.int64) * stride_wv)[None, :]
        z = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x = tl.load(x_row + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
            w = tl.load(w_row + k[:, None], mask=(k < K)[:, None] & (v < end)[None, :], other=0.0)
            z = tl.dot(x, w, z, input_precision="ieee")
        top, total, picked = _take(
            z, v, end, target, top, total, picked, softcap, HAS_SOFTCAP, x_ptr.dtype.element_ty == tl.float32
        )
    _leave(top_ptr, total_ptr, picked_ptr, tl.program_id(1), m, M, target, first, end, top, total, picked)


@triton.jit
def _logits_fwd_kernel(
    z_ptr, target_ptr, top_ptr, total_ptr, picked_ptr, row0, M, columns, token0, part0, softcap,
    PART: tl.constexpr, BLOCK: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """A program: PART of the columns of one row of logits; they are tokens token0 and on of row row0 and on."""
    row = tl.program_id(0).to(tl.int64)
    m = row0 + row + tl.arange(0, 1)
    target = tl.load(target_ptr + m)
    top = tl.full([1], -HIGHEST, tl.float32)
    total = tl.zeros([1], tl.float32)
    picked = tl.zeros([1], tl.float32)
    first = tl.program_id(1) * PART
    end = tl.minimum(first + PART, columns)
    for start in range(first, end, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + row * columns + v, mask=v < end, other=0.0)[None, :]
        top, total, picked = _take(z, v, end, target - token0, top, total, picked, softcap, HAS_SOFTCAP, True)
    part = part0 + tl.program_id(1)
    _leave(top_ptr, total_ptr, picked_ptr, part, m, M, target - token0, first, end, top, total, picked)


@triton.jit
def _loss_fwd_kernel(
    top_ptr,
    total_ptr,
    picked_ptr,
    target_ptr,
    loss_ptr,
    M,
    V,
    PARTS,
    ignore_index,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Adds the parts of BLOCK_M rows up, in fp64: few numbers, and the logarithm's last bits are the loss's."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    top = tl.full([BLOCK_M], -HIGHEST, tl.float64)
    total = tl.zeros([BLOCK_M], tl.float64)
    for start in range(0, PARTS, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at = p.to(tl.int64)[:, None] * M + m[None, :]
        mask = (p < PARTS)[:, None] & (m < M)[None, :]
        tops = tl.load(top_ptr + at, mask=mask, other=-HIGHEST).to(tl.float64)
        totals = tl.load(total_ptr + at, mask=mask, other=0.0).to(tl.float64)
        new = tl.maximum(top, tl.max(tops, 0))
        total = total * tl.exp(top - new) + tl.sum(totals * tl.exp(tops - new[None, :]), 0)
        top = new
    target = tl.load(target_ptr + m, mask=m < M, other=0)
    ignored = target == ignore_index
    # A kernel cannot raise, and asking before it would wait for the GPU: a target that is no token is answered loudly.
    known = (target >= 0) & (target < V)
    picked = tl.load(picked_ptr + m, mask=known & (m < M), other=float("nan")).to(tl.float64)
    loss = (top - picked) + tl.log(total)
    tl.store(loss_ptr + m, tl.where(ignored, 0.0, loss).to(tl.float32), mask=m < M)


# ---------------------------------------------------------------- launches


def _shipped(gpu: GPU, rows: int, itemsize: int) -> dict[str, Any]:
    """Tiles whose logits fit the registers twice: they are products and exponentials at once."""
    if itemsize == 4:  # no exact matrix instruction
        if rows <= FEW:
            return {"BLOCK_M": 16, "BLOCK_V": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
        return {"BLOCK_M": 64, "BLOCK_V": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}
    if rows <= FEW:
        return {"BLOCK_M": 16, "BLOCK_V": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    if rows <= 64:
        return {"BLOCK_M": 64, "BLOCK_V": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_V": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}


def _candidates(gpu: GPU, rows: int, itemsize: int) -> Iterator[dict[str, Any]]:
    base = _shipped(gpu, rows, itemsize)
    for block_v in (64, 128, 256):
        for block_k in (32, 64):
            for num_stages in (2, 3, 4):
                yield from warps(
                    {**base, "BLOCK_V": block_v, "BLOCK_K": block_k, "num_stages": num_stages, "num_warps": 0}, 4, 8
                )


def _bucket(M: int) -> int:
    """Which numbers of rows share a launch: up to 16, up to 64, more."""
    return FEW if M <= FEW else 64 if M <= 64 else 128


_LAUNCHES = LaunchTable("cross_entropy", _shipped, _candidates)


def _splits(blocks: int, tiles: int) -> tuple[int, int]:
    """Into how many parts the vocabulary is split and how many tiles each part gets."""
    each = triton.cdiv(tiles, max(1, min(tiles, triton.cdiv(PROGRAMS, blocks))))
    return triton.cdiv(tiles, each), each


def refuse(
    hidden: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    minimum: Tensor | None,
    target: Tensor,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    zero: int,
    layout: str,
    int8_activations: bool,
    *_: object,
) -> str | None:
    if scale is not None:
        form = n, k, bits, group_size, zero, layout, int8_activations
        return quant_matmul.refuse(hidden, weight, scale, minimum, None, *form)
    if (hidden.stride(-1) != 1 or weight.stride(-1) != 1) and k != 1:
        return "it reads rows whose last dim has stride 1"
    if rows(hidden) is None:
        return "it reads rows that lie in at most three strided dims"
    return None


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    minimum: Tensor | None,
    target: Tensor,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    zero: int,
    layout: str,
    int8_activations: bool,
    softcap: float,
    ignore_index: int,
) -> Tensor:
    loss = _op.empty(target.shape, dtype=torch.float32, device=hidden.device)
    M, targets = target.numel(), target.contiguous()
    if M == 0:
        return loss
    with device_of(hidden):
        if scale is None:
            tops, totals, picked = _fused(hidden, weight, targets, softcap)
        else:
            form = bits, group_size, zero, layout, int8_activations
            tops, totals, picked = _from_logits(hidden, weight, scale, minimum, targets, n, k, form, softcap)
        _loss_fwd_kernel[(triton.cdiv(M, 32),)](
            tops, totals, picked, targets, loss, M, n, len(tops), ignore_index, BLOCK_M=32, BLOCK_P=16, num_warps=4, **COMPILER
        )
    return loss


def _parts(parts: int, M: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (parts, M), (parts, M), (M,)
    tops, totals, picked = (_op.empty(shape, dtype=torch.float32, device=device) for shape in shapes)
    return tops, totals, picked


def _fused(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    at, (V, K) = rows(hidden), weight.shape
    assert at is not None  # refuse() has looked
    M = at.count
    launch = _LAUNCHES(hidden.device, _bucket(M), hidden.element_size())
    blocks = triton.cdiv(M, launch["BLOCK_M"])
    splits, each = _splits(blocks, triton.cdiv(V, launch["BLOCK_V"]))
    out = _parts(splits, M, hidden.device)
    _cross_entropy_fwd_kernel[(blocks, splits)](
        hidden, weight, target, *out, M, V, K, softcap, each * launch["BLOCK_V"], weight.stride(0), *at.args,
        HAS_SOFTCAP=softcap > 0, **launch, **COMPILER,
    )  # fmt: skip
    return out


def _from_logits(
    hidden: Tensor, data: Tensor, scale: Tensor, minimum: Tensor | None, target: Tensor,
    V: int, K: int, form: tuple[int, int, int, str, bool], softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    M, x = target.numel(), hidden.reshape(-1, K)
    stretch = max(TILE // min(M, ROWS) // PART, 1) * PART
    out = _parts(triton.cdiv(V, PART), M, hidden.device)
    for first in range(0, V, stretch):
        columns = min(stretch, V - first)
        blocks = slice(first // 16, (first + columns + 15) // 16)  # of 16 rows of the weight
        few = None if minimum is None else minimum[blocks]
        for row in range(0, M, ROWS):
            part = x[row : row + ROWS]
            logits = quant_matmul.quant_matmul(
                part, data[blocks], scale[blocks], few, None, columns, K, *form, dtype=torch.float32
            )
            _logits_fwd_kernel[(len(part), triton.cdiv(columns, PART))](
                logits, target, *out, row, M, columns, first, first // PART, softcap,
                PART=PART, BLOCK=BLOCK, HAS_SOFTCAP=softcap > 0, num_warps=4, **COMPILER,
            )  # fmt: skip
    return out


# ---------------------------------------------------------------- for `fastllm compile`


def builds(gpu: GPU) -> Iterator[Build]:
    """Every launch with a softcap and without; what a quantised weight's logits go through (quant_matmul lists their making)."""
    outputs = {"target_ptr": "*i64", "top_ptr": "*fp32", "total_ptr": "*fp32", "picked_ptr": "*fp32"}
    strides = {f"x_{name}": "i32" for name in ("s0", "s1", "s2")}
    for dtype in ("bf16", "fp16", "fp32"):
        for M in (16, 64, 512):
            if dtype == "fp32" and M == 64:  # the launch of 512
                continue
            for softcap, batch in ((False, False), (True, False), (False, True)):
                numbers = dict.fromkeys(("M", "V", "K", "split_tokens", "stride_wv"), "i32")
                # The launcher makes an argument of 1 a constant.
                rows_in, one = ({"x_n2": "i32"}, {}) if batch else ({}, {"x_n2": 1})
                yield Build(
                    _cross_entropy_fwd_kernel,
                    f"M={M} {dtype}"
                    + (" softcap" if softcap else "")
                    + (", all tokens but the last of several rows" if batch else ""),
                    {"x_ptr": f"*{dtype}", "w_ptr": f"*{dtype}", **outputs, **numbers, "softcap": "fp32", **strides} | rows_in,
                    {"HAS_SOFTCAP": softcap, "x_n1": 1} | one,
                    _shipped(gpu, _bucket(M), 4 if dtype == "fp32" else 2),
                    matrix=dtype != "fp32",
                    aligned=("V", "K", "split_tokens", "stride_wv", *strides),
                )
    for softcap in (False, True):
        numbers = dict.fromkeys(("row0", "M", "columns", "token0", "part0"), "i32")
        yield Build(
            _logits_fwd_kernel,
            "logits" + (" softcap" if softcap else ""),
            {"z_ptr": "*fp32", **outputs, **numbers, "softcap": "fp32"},
            {"PART": PART, "HAS_SOFTCAP": softcap},
            {"BLOCK": BLOCK},
            aligned=("row0", "columns", "token0"),
        )
    numbers = dict.fromkeys(("M", "V", "PARTS", "ignore_index"), "i32")
    yield Build(_loss_fwd_kernel, "parts", {**outputs, "loss_ptr": "*fp32", **numbers}, {}, {"BLOCK_M": 32, "BLOCK_P": 16})
