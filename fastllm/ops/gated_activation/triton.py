"""gated_activation in Triton: a program holds BLOCK_I columns of one row, each element read once.

Cost: 2 M I elements read and M I written; about 12 flops for 6 bytes in bf16: bandwidth is the limit. On an H200, whose copies
reach about 4.3 TB/s, 4096 x 14336 bf16 is 352 MB, 82 us at best. With GROUP columns to a scale y is written as int8: I + 8 I / GROUP
bytes a row in place of 2 I, and what rounds it elsewhere, a launch that reads 2 I and writes as many, is gone.
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

BLOCK_I = 1024  # 8 elements of 2 bytes, a vector load, for each of 128 threads


@triton.jit
def _gated_activation_fwd_kernel(
    g_ptr, u_ptr, y_ptr, groups_ptr,
    columns,
    g_n1, g_n2, g_s0, g_s1, g_s2,
    u_n1, u_n2, u_s0, u_s1, u_s2,
    BLOCK: tl.constexpr, GELU_TANH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    first = tl.program_id(1) * BLOCK
    i = first + tl.arange(0, BLOCK)
    inside = i < columns
    g = tl.load(g_ptr + row_start(row, g_n1, g_n2, g_s0, g_s1, g_s2) + i, mask=inside, other=0.0)
    u = tl.load(u_ptr + row_start(row, u_n1, u_n2, u_s0, u_s1, u_s2) + i, mask=inside, other=0.0)
    x = g.to(tl.float32)
    # g/2 (1 + tanh z) = g sigmoid(2 z): both activations are g / (1 + e^-t), and e^-t may be infinite without harm.
    t = 1.5957691216057308 * (x + 0.044715 * x * x * x) if GELU_TANH else x
    y = (x / (1.0 + tl.exp(-t)) * u.to(tl.float32)).to(g.dtype)
    if GROUP > 0:
        y = y.to(tl.float32)[None, :]  # columns past the last are 0 times 0
        whole = tl.full([1], 0, tl.int64) + row
        store_int8_groups(y_ptr, groups_ptr, whole, first, y, whole[:, None] >= 0, columns, GROUP)
    else:
        tl.store(y_ptr + row.to(tl.int64) * columns + i, y, mask=inside)


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
    y = _op.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _launch(gate, up, activation, y, None, 0)
    return y


def gated_activation_int8(gate: Tensor, up: Tensor | None, activation: str, group_size: int) -> tuple[Tensor, Tensor]:
    if up is None:
        gate, up = gate.chunk(2, -1)
    *leading, columns = gate.shape
    data = _op.empty(gate.shape, dtype=torch.int8, device=gate.device)
    groups = _op.empty((*leading, triton.cdiv(columns, group_size), 2), dtype=torch.float32, device=gate.device)
    _launch(gate, up, activation, data, groups, group_size)
    return data, groups


def _launch(gate: Tensor, up: Tensor, activation: str, y: Tensor, groups: Tensor | None, group_size: int) -> None:
    columns = gate.shape[-1]
    g, u, launch = rows(gate), rows(up), _LAUNCHES(gate.device, power_of_two(max(columns, group_size)))
    assert g is not None  # refuse() has looked
    assert u is not None
    if y.numel():
        with device_of(gate):
            _gated_activation_fwd_kernel[(g.count, triton.cdiv(columns, launch["BLOCK"]))](
                gate, up, y, groups, columns, *g.args, *u.args,
                GELU_TANH=activation == "gelu_tanh", GROUP=group_size, **launch, **COMPILER,
            )  # fmt: skip


def builds(gpu: GPU) -> Iterator[Build]:
    strides = {f"{t}_{name}": "i32" for t in "gu" for name in ("n1", "n2", "s0", "s1", "s2")}
    for dtype in ("bf16", "fp32"):
        for gelu, group in ((False, 0), (True, 0), (False, 32), (True, 32), (False, 64), (False, 128)):
            # y first: what it is made of tells launches apart.
            pointers = {"y_ptr": "*i8" if group else f"*{dtype}", "g_ptr": f"*{dtype}", "u_ptr": f"*{dtype}"}
            pointers |= {"groups_ptr": "*fp32"} if group else {}
            yield Build(
                _gated_activation_fwd_kernel,
                f"I=8192 {dtype} {'gelu_tanh' if gelu else 'silu'}" + (f" to int8 g{group}" if group else ""),
                {**pointers, "columns": "i32", **strides},
                {"GELU_TANH": gelu, "GROUP": group} | ({} if group else {"groups_ptr": None}),
                _shipped(gpu, 8192),
                aligned=("columns", "g_s2", "u_s2"),
            )
