"""rms_norm in CUDA C++: allocates the outputs, calls fastllm._cuda."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import cuda_module
from .. import _op

_cuda: Any = cuda_module()


def refuse(x: Tensor, weight: Tensor | None, residual: Tensor | None, *_: object) -> str | None:
    reason = _op.refuse_unless_cuda(x, weight, residual)
    if reason is None:
        if x.stride(-1) != 1 or (residual is not None and residual.stride(-1) != 1):
            return "it reads rows whose last dim has stride 1"
        if weight is not None and weight.stride(0) != 1:
            return "it reads a weight of stride 1"
    return reason


def rms_norm(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, offset: float, round_before_weight: bool
) -> Any:
    y = _op.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else _op.empty(x.shape, dtype=x.dtype, device=x.device)
    _cuda.rms_norm(x, weight, residual, y, total, eps, offset, round_before_weight)
    return y if total is None else (y, total)


def refuse_int8(x: Tensor, weight: Tensor | None, residual: Tensor | None, *args: object) -> str | None:
    return refuse(x, weight, residual, *args) or _op.refuse_unless_vectors(
        "the rows that it rounds", x=x, weight=weight, residual=residual
    )


def rms_norm_int8(
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    offset: float,
    round_before_weight: bool,
    group_size: int,
) -> Any:
    *rows, K = x.shape
    data = _op.empty(x.shape, dtype=torch.int8, device=x.device)
    groups = _op.empty((*rows, -(-K // group_size), 2), dtype=torch.float32, device=x.device)
    total = None if residual is None else _op.empty(x.shape, dtype=x.dtype, device=x.device)
    _cuda.rms_norm_int8(x, weight, residual, data, groups, total, eps, offset, round_before_weight, group_size)
    return (data, groups) if total is None else (data, groups, total)
