"""rms_norm in Triton: a program holds BLOCK_M rows, so that each element is read once.

Cost: M K elements read and M K written (2 M K and 2 M K with a residual), and K of the weight, which stays in cache. About 5
flops for 4 bytes in bf16: bandwidth is the limit. On an H200, whose copies reach about 4.3 TB/s, 4096 x 8192 bf16 is 134 MB, 31
us at best. Rows of up to ONE_BLOCK elements stay in registers; longer ones are read twice, the second time from L2.

With GROUP columns to a scale y is written as int8: K + 8 K / GROUP bytes a row in place of 2 K, and what rounds it elsewhere, a
launch that reads 2 K and writes as many, is gone.
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
from .._triton import COMPILER, Build, device_of, power_of_two, rows
from .._triton_kernels import row_start, store_int8_groups

ONE_BLOCK = 16384
LOOP_BLOCK = 4096  # of longer rows: 8 elements a thread, so that addresses and fp32's fp64 squares stay in registers
TILE = 1024  # elements below which a program takes several rows: a head's q_norm has 64 to 256


@triton.jit
def _squares(h):
    """fp32 elements square into fp64: beside an outlier the sum of the others would lose its last bits."""
    wide = h.to(tl.float64) if h.dtype == tl.float32 else h.to(tl.float32)
    return wide * wide


@triton.jit
def _inverse_rms(squares, K, eps):
    """1 / sqrt(mean + eps) a row: few numbers, so fp64 costs little; fp32's four roundings would shift the whole row."""
    mean = tl.sum(squares, 1).to(tl.float64) / K + eps
    return (1.0 / tl.sqrt(mean)).to(tl.float32)[:, None]


@triton.jit
def _load_sum(x_ptr, r_ptr, x_at, r_at, mask, HAS_RESIDUAL: tl.constexpr):
    """h = x + residual in fp32, rounded to their dtype as PyTorch's add does."""
    h = tl.load(x_ptr + x_at, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        h = (h.to(tl.float32) + tl.load(r_ptr + r_at, mask=mask, other=0.0).to(tl.float32)).to(h.dtype)
    return h


@triton.jit
def _scaled(h, inverse, w_ptr, k, K, offset, HAS_WEIGHT: tl.constexpr, ROUND_FIRST: tl.constexpr):
    """h / rms * (weight + offset), in fp32; LLaMA rounds h / rms to the working dtype in between."""
    y = h.to(tl.float32) * inverse
    if HAS_WEIGHT:
        if ROUND_FIRST:
            y = y.to(h.dtype).to(tl.float32)
        y = y * (tl.load(w_ptr + k, mask=k < K, other=0.0).to(tl.float32) + offset)[None, :]
    return y


@triton.jit
def _store_int8(y_ptr, groups_ptr, row, first, k, y, inside, K, DTYPE: tl.constexpr, GROUP: tl.constexpr):
    """y (M, BLOCK) in fp32, columns k = first, first + 1, ...: rounded to DTYPE first."""
    y = tl.where((k < K)[None, :], y.to(DTYPE).to(tl.float32), 0.0)
    store_int8_groups(y_ptr, groups_ptr, row, first, y, inside, K, GROUP)


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr, r_ptr, w_ptr, y_ptr, groups_ptr, h_ptr,
    M, K, eps, offset,
    x_n1, x_n2, x_s0, x_s1, x_s2,
    r_n1, r_n2, r_s0, r_s1, r_s2,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ONE_PASS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROUND_FIRST: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_at = row_start(row, x_n1, x_n2, x_s0, x_s1, x_s2)[:, None]
    r_at = row_start(row, r_n1, r_n2, r_s0, r_s1, r_s2)[:, None]
    out = (row * K)[:, None]
    k = tl.arange(0, BLOCK_K)
    inside = (row < M)[:, None]
    if ONE_PASS:
        mask = inside & (k < K)[None, :]
        h = _load_sum(x_ptr, r_ptr, x_at + k[None, :], r_at + k[None, :], mask, HAS_RESIDUAL)
        inverse = _inverse_rms(_squares(h), K, eps)
        y = _scaled(h, inverse, w_ptr, k, K, offset, HAS_WEIGHT, ROUND_FIRST)
        if GROUP > 0:
            _store_int8(y_ptr, groups_ptr, row, 0, k, y, inside, K, h.dtype, GROUP)
        else:
            tl.store(y_ptr + out + k[None, :], y.to(h.dtype), mask=mask)
        if HAS_RESIDUAL:
            tl.store(h_ptr + out + k[None, :], h, mask=mask)
    else:
        squares = tl.zeros([BLOCK_M, BLOCK_K], tl.float64 if x_ptr.dtype.element_ty == tl.float32 else tl.float32)
        for start in range(0, K, BLOCK_K):
            at = start + k
            mask = inside & (at < K)[None, :]
            squares += _squares(_load_sum(x_ptr, r_ptr, x_at + at[None, :], r_at + at[None, :], mask, HAS_RESIDUAL))
        inverse = _inverse_rms(squares, K, eps)
        for start in range(0, K, BLOCK_K):
            at = start + k
            mask = inside & (at < K)[None, :]
            h = _load_sum(x_ptr, r_ptr, x_at + at[None, :], r_at + at[None, :], mask, HAS_RESIDUAL)
            y = _scaled(h, inverse, w_ptr, at, K, offset, HAS_WEIGHT, ROUND_FIRST)
            if GROUP > 0:
                _store_int8(y_ptr, groups_ptr, row, start, at, y, inside, K, h.dtype, GROUP)
            else:
                tl.store(y_ptr + out + at[None, :], y.to(h.dtype), mask=mask)
            if HAS_RESIDUAL:
                tl.store(h_ptr + out + at[None, :], h, mask=mask)


def _shipped(gpu: GPU, block_k: int) -> dict[str, Any]:
    """Block sizes and warps for rows of up to block_k: at most 32 elements a thread, at least one warp of rows."""
    if block_k > ONE_BLOCK:
        return {"BLOCK_M": 1, "BLOCK_K": LOOP_BLOCK, "ONE_PASS": False, "num_warps": 16}
    block_m = max(1, TILE // block_k)
    return {
        "BLOCK_M": block_m,
        "BLOCK_K": block_k,
        "ONE_PASS": True,
        "num_warps": min(16, max(1, block_m * block_k // 1024)),
    }


def _candidates(gpu: GPU, block_k: int) -> Iterator[dict[str, Any]]:
    base = _shipped(gpu, block_k)
    n = base["num_warps"]
    yield from warps(base, n // 2, n * 2)
    if block_k <= ONE_BLOCK // 2:  # twice the rows, or half of them
        yield from warps({**base, "BLOCK_M": base["BLOCK_M"] * 2, "num_warps": 0}, n, n * 2)


_LAUNCHES = LaunchTable("rms_norm", _shipped, _candidates)


def refuse(x: Tensor, weight: Tensor | None, residual: Tensor | None, *_: object) -> str | None:
    if x.stride(-1) != 1 or (residual is not None and residual.stride(-1) != 1):
        return "it reads rows whose last dim has stride 1"
    if weight is not None and weight.stride(0) != 1:
        return "it reads a weight of stride 1"
    if rows(x) is None or (residual is not None and rows(residual) is None):
        return "it reads rows that lie in at most three strided dims"
    return None


def rms_norm(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, offset: float, round_before_weight: bool
) -> Any:
    y = _op.empty(x.shape, dtype=x.dtype, device=x.device)
    h = _launch(x, weight, residual, y, None, 0, eps, offset, round_before_weight)
    return y if h is None else (y, h)


def rms_norm_int8(
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    offset: float,
    round_before_weight: bool,
    group_size: int,
) -> Any:
    *leading, K = x.shape
    data = _op.empty(x.shape, dtype=torch.int8, device=x.device)
    groups = _op.empty((*leading, triton.cdiv(K, group_size), 2), dtype=torch.float32, device=x.device)
    h = _launch(x, weight, residual, data, groups, group_size, eps, offset, round_before_weight)
    return (data, groups) if h is None else (data, groups, h)


def _launch(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, y: Tensor, groups: Tensor | None, group_size: int,
    eps: float, offset: float, round_before_weight: bool,
) -> Tensor | None:  # fmt: skip
    """Fills y, and groups if y is int8. Returns x + residual."""
    h = None if residual is None else _op.empty(x.shape, dtype=x.dtype, device=x.device)
    at, K = rows(x), x.shape[-1]
    other = at if residual is None else rows(residual)
    assert at is not None  # refuse() has looked
    assert other is not None
    launch = _LAUNCHES(x.device, power_of_two(max(K, group_size)))
    if x.numel():
        with device_of(x):
            _rms_norm_fwd_kernel[(triton.cdiv(at.count, launch["BLOCK_M"]),)](
                x, residual, weight, y, groups, h, at.count, K, eps, offset, *at.args, *other.args,
                HAS_WEIGHT=weight is not None, HAS_RESIDUAL=residual is not None, ROUND_FIRST=round_before_weight,
                GROUP=group_size, **launch, **COMPILER,
            )  # fmt: skip
    return h


def builds(gpu: GPU) -> Iterator[Build]:
    strides = {f"{t}_{name}": "i32" for t in "xr" for name in ("n1", "n2", "s0", "s1", "s2")}
    for dtype in ("bf16", "fp32"):
        for K in (64, 4096, 16384, 65536):
            for residual, group in ((False, 0), (True, 0), (False, 32), (True, 32), (True, 64), (True, 128)):
                # y first: what it is made of tells launches apart.
                pointers = {"y_ptr": "*i8" if group else f"*{dtype}", "x_ptr": f"*{dtype}", "w_ptr": f"*{dtype}"}
                if residual:
                    pointers |= {"r_ptr": f"*{dtype}", "h_ptr": f"*{dtype}"}
                if group:
                    pointers |= {"groups_ptr": "*fp32"}
                none = dict.fromkeys(() if residual else ("r_ptr", "h_ptr")) | dict.fromkeys(() if group else ("groups_ptr",))
                yield Build(
                    _rms_norm_fwd_kernel,
                    f"K={K} {dtype}" + (" residual" if residual else "") + (f" to int8 g{group}" if group else ""),
                    {**pointers, "M": "i32", "K": "i32", "eps": "fp32", "offset": "fp32", **strides},
                    {**none, "HAS_WEIGHT": True, "HAS_RESIDUAL": residual, "ROUND_FIRST": True, "GROUP": group},
                    _shipped(gpu, power_of_two(max(K, group))),
                    aligned=("K", "x_s2", "r_s2"),
                )
