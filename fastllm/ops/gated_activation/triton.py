"""gated_activation in Triton: a program holds BLOCK_I columns of one row, each element read once.

Cost: 2 M I elements read and M I written; about 12 flops for 6 bytes in bf16: bandwidth is the limit. On an H200, whose copies
reach about 4.3 TB/s, 4096 x 14336 bf16 is 352 MB, 82 us at best.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .. import _op
from .._launch import GPU, LaunchTable, warps
from .._triton import COMPILER, Build, device_of, power_of_two, rows
from .._triton_kernels import row_start

BLOCK_I = 1024  # 8 elements of 2 bytes, a vector load, for each of 128 threads


@triton.jit
def _gated_activation_fwd_kernel(
    g_ptr, u_ptr, y_ptr,
    columns,
    g_n1, g_n2, g_s0, g_s1, g_s2,
    u_n1, u_n2, u_s0, u_s1, u_s2,
    BLOCK: tl.constexpr, GELU_TANH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < columns
    g = tl.load(g_ptr + row_start(row, g_n1, g_n2, g_s0, g_s1, g_s2) + i, mask=inside, other=0.0)
    u = tl.load(u_ptr + row_start(row, u_n1, u_n2, u_s0, u_s1, u_s2) + i, mask=inside, other=0.0)
    x = g.to(tl.float32)
    # g/2 (1 + tanh z) = g sigmoid(2 z): both activations are g / (1 + e^-t), and e^-t may be infinite without harm.
    t = 1.5957691216057308 * (x + 0.044715 * x * x * x) if GELU_TANH else x
    y = x / (1.0 + tl.exp(-t)) * u.to(tl.float32)
    tl.store(y_ptr + row.to(tl.int64) * columns + i, y.to(g.dtype), mask=inside)


def _shipped(gpu: GPU, columns: int) -> dict[str, Any]:
    block = min(BLOCK_I, max(32, columns))
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


def _candidates(gpu: GPU, columns: int) -> Iterator[dict[str, Any]]:
    for block in (BLOCK_I // 2, BLOCK_I, BLOCK_I * 2, BLOCK_I * 4):
        if block <= columns:
            yield from warps({"BLOCK": block, "num_warps": 0}, block // 256, block // 128)


_LAUNCHES = LaunchTable("gated_activation", _shipped, _candidates)


def refuse(gate: Tensor, up: Tensor | None, *_: object) -> str | None:
    for t in (gate, up):
        if t is not None and t.stride(-1) != 1 and t.shape[-1] > 1:
            return "it reads rows whose last dim has stride 1"
        if t is not None and rows(t) is None:
            return "it reads rows that lie in at most three strided dims"
    return None


def gated_activation(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    if up is None:
        gate, up = gate.chunk(2, -1)
    columns = gate.shape[-1]
    y = _op.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    g, u, launch = rows(gate), rows(up), _LAUNCHES(gate.device, power_of_two(columns))
    assert g is not None  # refuse() has looked
    assert u is not None
    if y.numel():
        with device_of(gate):
            _gated_activation_fwd_kernel[(g.count, triton.cdiv(columns, launch["BLOCK"]))](
                gate, up, y, columns, *g.args, *u.args, GELU_TANH=activation == "gelu_tanh", **launch, **COMPILER
            )
    return y


def builds(gpu: GPU) -> Iterator[Build]:
    strides = {f"{t}_{name}": "i32" for t in "gu" for name in ("n1", "n2", "s0", "s1", "s2")}
    for dtype in ("bf16", "fp32"):
        for gelu in (False, True):
            yield Build(
                _gated_activation_fwd_kernel,
                f"I=8192 {dtype} {'gelu_tanh' if gelu else 'silu'}",
                {"g_ptr": f"*{dtype}", "u_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "columns": "i32", **strides},
                {"GELU_TANH": gelu},
                _shipped(gpu, 8192),
                aligned=("columns", "g_s2", "u_s2"),
            )
