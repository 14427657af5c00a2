"""embedding in Triton: rows of a quantised table, a program for each id and block of columns.

Cost: K bits / 8 bytes and scales read and K elements written for each id; 3 flops an element: bandwidth is the limit. A row of
the "x16" layout lies in pieces of 4 bytes, 64 apart, so memory moves up to 32 bytes for each 4: for int8 K = 4096 that is 32 KB
an id, 8 ns at an H200's 4.3 TB/s, and a decode step has one id a sequence.
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
from .._triton import COMPILER, Build, device_of, power_of_two
from .._triton_kernels import quantized_base

BLOCK = 1024


@triton.jit
def _embedding_fwd_kernel(
    ids_ptr, w_ptr, scale_ptr, minimum_ptr, y_ptr,
    N, K, LINES, GROUPS, zero,
    BLOCK_K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, HAS_MINIMUM: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = 32 // BITS
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.load(ids_ptr + row).to(tl.int64)
    known = (n >= 0) & (n < N)
    n = tl.where(known, n, 0)
    mask = k < K
    q = tl.load(w_ptr + quantized_base(n, N, LINES) * 4 + k // COLUMNS * 64 + k % 4, mask=mask, other=0)
    if BITS == 4:
        q = (q >> (k // 4 % 2 * 4).to(tl.uint8)) & 15
    group = quantized_base(n, N, GROUPS) + (k // GROUP * 16 if GROUP else k * 0)
    scale = tl.load(scale_ptr + group, mask=mask, other=0.0).to(tl.float32)
    minimum = tl.load(minimum_ptr + group, mask=mask, other=0.0).to(tl.float32) if HAS_MINIMUM else scale
    w = q.to(tl.float32) - zero
    w = tl.fma(w, scale, minimum) if HAS_MINIMUM else w * scale
    # A kernel cannot raise, and asking before it would wait for the GPU: an id that is no row is answered loudly.
    w = tl.where(known, w, float("nan"))
    tl.store(y_ptr + row * K + k, w.to(y_ptr.dtype.element_ty), mask=mask)


def _shipped(gpu: GPU, columns: int) -> dict[str, Any]:
    """At most 8 elements a thread."""
    block_k = min(columns, BLOCK)
    return {"BLOCK_K": block_k, "num_warps": max(1, block_k // 256)}


def _candidates(gpu: GPU, columns: int) -> Iterator[dict[str, Any]]:
    for block_k in (BLOCK // 4, BLOCK // 2, BLOCK):
        if block_k <= columns:
            yield from warps({"BLOCK_K": block_k, "num_warps": 0}, block_k // 256, block_k // 128)


_LAUNCHES = LaunchTable("embedding", _shipped, _candidates)


def refuse(ids: Tensor, data: Tensor, scale: Tensor, minimum: Tensor | None, *form: Any) -> str | None:
    if (layout := form[5]) != "x16":
        return f"it reads tables in layout 'x16', not '{layout}'; pack() them"
    return None


def embedding(
    ids: Tensor,
    data: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    zero: int,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    y = _op.empty((*ids.shape, k), dtype=dtype, device=data.device)
    if y.numel():
        launch = _LAUNCHES(data.device, power_of_two(k))
        with device_of(data):
            _embedding_fwd_kernel[(ids.numel(), triton.cdiv(k, launch["BLOCK_K"]))](
                ids.contiguous(), data, scale, minimum, y, n, k, data.shape[1], scale.shape[1], float(zero),
                BITS=bits, GROUP=0 if scale.shape[1] == 1 else group_size, HAS_MINIMUM=minimum is not None, **launch, **COMPILER,
            )  # fmt: skip
    return y


def builds(gpu: GPU) -> Iterator[Build]:
    for dtype in ("bf16", "fp16", "fp32"):
        for K in (576, 2048, 4096):
            for bits, group, minimum in ((8, 32, False), (8, 0, False), (4, 32, True), (4, 128, True)):
                pointers = {"ids_ptr": "*i64", "w_ptr": "*u8", "scale_ptr": "*fp16", "y_ptr": f"*{dtype}"}
                pointers |= {"minimum_ptr": "*fp16"} if minimum else {}
                numbers = {"N": "i32", "K": "i32", "LINES": "i32", "GROUPS": "i32", "zero": "fp32"}
                none = {} if minimum else {"minimum_ptr": None}
                yield Build(
                    _embedding_fwd_kernel,
                    f"K={K} {dtype} int{bits} " + (f"g{group}" if group else "rows") + (" minimum" if minimum else ""),
                    {**pointers, **numbers},
                    {**none, "BITS": bits, "GROUP": group, "HAS_MINIMUM": minimum},
                    _shipped(gpu, power_of_two(K)),
                    aligned=("N", "K", "LINES"),
                )
