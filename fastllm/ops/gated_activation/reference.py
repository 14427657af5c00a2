"""Gated activations in plain PyTorch (Shazeer, 2020, https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...quant.activations import Int8Activations


def gated_activation(gate: Tensor, up: Tensor | None = None, activation: str = "silu", *, int8_group: int | None = None) -> Any:
    if up is None:
        gate, up = gate.chunk(2, -1)
    wide = torch.float32 if gate.dtype in (torch.float16, torch.bfloat16) else gate.dtype
    g, u = gate.to(wide), up.to(wide)
    if activation == "silu":
        activated = torch.nn.functional.silu(g)  # g * sigmoid(g)
    else:
        activated = 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
    y = (activated * u).to(gate.dtype)
    return y if int8_group is None else Int8Activations.of(y, int8_group)
