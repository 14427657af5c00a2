"""rms_norm on the CPU, its result float or int8: allocates the outputs, calls fastllm._cpu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, get_num_threads

from ...backends import cpu_module
from .. import _op

_cpu: Any = cpu_module()


def refuse(x: Tensor, weight: Tensor | None, residual: Tensor | None, *_: object) -> str | None:
    reason = _op.refuse_unless_cpu(x, weight, residual)
    if reason is None:
        if x.stride(-1) != 1 or (residual is not None and residual.stride(-1) != 1):
            return "it reads rows whose last dim has stride 1"
        if weight is not None and weight.stride(0) != 1:
            return "it reads a weight of stride 1"
    return reason


def rms_norm(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, offset: float, round_before_weight: bool
) -> Any:
    y = _op.empty(x.shape, dtype=x.dtype)
    total = None if residual is None else _op.empty(x.shape, dtype=x.dtype)
    _cpu.rms_norm(x, weight, residual, y, total, eps, offset, round_before_weight, get_num_threads())
    return y if total is None else (y, total)


def rms_norm_int8(x: Tensor, weight: Tensor | None, residual: Tensor | None, *scalars: Any) -> tuple[Tensor, ...]:
    *rows, K = x.shape
    *args, group_size = scalars
    y = _op.empty(x.shape, dtype=torch.int8)
    groups = _op.empty((*rows, -(-K // group_size), 2), dtype=torch.float32)
    total = None if residual is None else _op.empty(x.shape, dtype=x.dtype)
    _cpu.rms_norm_int8(x, weight, residual, y, groups, total, *args, group_size, get_num_threads())
    return (y, groups) if total is None else (y, groups, total)
