"""A quantised linear layer in plain PyTorch: dequantise the stored weights, multiply.

With ``activations="int8"`` the activations are rounded to integers first (``fastllm/quant/activations.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...quant.activations import Int8Activations, activation_group, dequantize_activations, quantize_activations
from ...quant.tensor import QuantizedTensor


class _StraightThrough(torch.autograd.Function):
    """Activations rounded to int8 and widened again; gradients pass as if nothing had been rounded (Bengio et al., 2013)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
        return dequantize_activations(*quantize_activations(x, group_size), group_size, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.to(ctx.dtype), None, None


def round_activations(x: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """What int8 activations stand for, in dtype."""
    return _StraightThrough.apply(x, group_size, dtype)


def quant_matmul(
    x: Tensor | Int8Activations, w: QuantizedTensor, bias: Tensor | None = None, *, activations: str = "float"
) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if isinstance(x, Int8Activations):
        seen = x.dequantize(wide)
    elif activations == "int8":
        seen = round_activations(x, activation_group(w.group_size), wide)
    else:
        seen = x.to(wide)
    y = seen @ w.dequantize(wide).T
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)
