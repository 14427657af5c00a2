"""gated_activation on the CPU, its result float or int8: allocates the output, calls fastllm._cpu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, get_num_threads

from ...backends import cpu_module
from .. import _op

_cpu: Any = cpu_module()


def refuse(gate: Tensor, up: Tensor | None, *_: object) -> str | None:
    reason = _op.refuse_unless_cpu(gate, up)
    if reason is None:
        for t in (gate, up):
            if t is not None and t.stride(-1) != 1 and t.shape[-1] > 1:
                return "it reads rows whose last dim has stride 1"
    return reason


def gated_activation(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    *rows, last = gate.shape
    y = _op.empty((*rows, last if up is not None else last // 2), dtype=gate.dtype)
    _cpu.gated_activation(gate, up, y, activation == "gelu_tanh", get_num_threads())
    return y


def gated_activation_int8(gate: Tensor, up: Tensor | None, activation: str, group_size: int) -> tuple[Tensor, Tensor]:
    *rows, last = gate.shape
    columns = last if up is not None else last // 2
    y = _op.empty((*rows, columns), dtype=torch.int8)
    groups = _op.empty((*rows, -(-columns // group_size), 2), dtype=torch.float32)
    _cpu.gated_activation_int8(gate, up, y, groups, activation == "gelu_tanh", group_size, get_num_threads())
    return y, groups
