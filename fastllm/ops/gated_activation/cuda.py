"""gated_activation in CUDA C++: allocates the output, calls fastllm._cuda."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import cuda_module
from .. import _op

_cuda: Any = cuda_module()


def refuse(gate: Tensor, up: Tensor | None, *_: object) -> str | None:
    for t in (gate, up):
        if t is not None and t.stride(-1) != 1 and t.shape[-1] > 1:
            return "it reads rows whose last dim has stride 1"
    return _op.refuse_unless_cuda(gate, up)


def gated_activation(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    if up is None:
        gate, up = gate.chunk(2, -1)
    y = _op.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _cuda.gated_activation(gate, up, y, activation == "gelu_tanh")
    return y


def refuse_int8(gate: Tensor, up: Tensor | None, *args: object) -> str | None:
    reason = refuse(gate, up, *args)
    if reason is not None:
        return reason
    if up is None:
        gate, up = gate.chunk(2, -1)
    return _op.refuse_unless_vectors("the rows that it rounds", gate=gate, up=up)


def gated_activation_int8(gate: Tensor, up: Tensor | None, activation: str, group_size: int) -> tuple[Tensor, Tensor]:
    if up is None:
        gate, up = gate.chunk(2, -1)
    *rows, columns = gate.shape
    data = _op.empty(gate.shape, dtype=torch.int8, device=gate.device)
    groups = _op.empty((*rows, -(-columns // group_size), 2), dtype=torch.float32, device=gate.device)
    _cuda.gated_activation_int8(gate, up, data, groups, activation == "gelu_tanh", group_size)
    return data, groups
