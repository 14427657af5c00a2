"""quant_matmul on the CPU: allocates the output, calls fastllm._cpu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, get_num_threads

from ...backends import cpu_module
from .. import _op

_cpu: Any = cpu_module()


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
    reason = _op.refuse_unless_cpu(x, data, scale, minimum, bias)
    if reason is None:
        if x.stride(-1) != 1 and k != 1:
            return "it reads rows whose last dim has stride 1"
        if bias is not None and bias.stride(0) != 1 and n != 1:
            return "it reads a bias of stride 1"
        if layout != "x16":
            return f"it reads weights in layout 'x16', not '{layout}'; pack() them"
    return reason


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
) -> Tensor:
    y = _op.empty((*x.shape[:-1], n), dtype=x.dtype)
    _cpu.quant_matmul(x, data, scale, minimum, bias, y, n, k, bits, group_size, zero, int8_activations, get_num_threads())
    return y


def refuse_int8(x: Tensor, x_groups: Tensor, *args: Any) -> str | None:
    reason = refuse(x, *args) or _op.refuse_unless_cpu(x_groups)
    if reason is None and not x_groups.is_contiguous():
        return "it reads contiguous scales and sums of x"
    return reason


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
    y = _op.empty((*x.shape[:-1], n), dtype=dtype)
    _cpu.quant_matmul_int8(x, x_groups, data, scale, minimum, bias, y, n, k, bits, group_size, zero, get_num_threads())
    return y
