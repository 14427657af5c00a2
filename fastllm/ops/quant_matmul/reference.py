"""A quantised linear layer in plain PyTorch: dequantise the stored weights, multiply.

With ``activations="int8"`` the activations are rounded to integers first, symmetric, a scale for each token and group of
columns (LLM.int8(), Dettmers et al., 2022, https://arxiv.org/abs/2208.07339, is the idea; the groups are llama.cpp's).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...quant.rounding import TINY
from ...quant.tensor import QuantizedTensor


def activation_group(group_size: int) -> int:
    """Columns that share a scale: as many as the weights' do, at most 128."""
    return group_size if group_size in (32, 64) else 128


def quantize_activations(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """x (..., K) -> integers (..., K) and scales (..., ceil(K / group_size)), both fp32.

    amax = max|x| of the group; scale = amax / 127; integer = round_half_even(x * (127 / amax)), all in fp32, so that every
    backend finds the same integers. A group that holds an infinity or a NaN gets the scale NaN.
    """
    k = x.shape[-1]
    grouped = torch.nn.functional.pad(x.float(), (0, -k % group_size)).unflatten(-1, (-1, group_size))
    amax = grouped.abs().amax(-1, keepdim=True)
    usable = amax.isfinite() & (amax >= TINY)
    steps = torch.full_like(amax, 127.0)  # a tensor: PyTorch turns number / tensor into number * (1 / tensor)
    inverse = torch.where(usable, steps / amax, 0.0)
    q = torch.where(usable, (grouped * inverse).round(), 0.0)
    scale = torch.where(usable, amax / steps, torch.where(amax.isfinite(), 0.0, torch.nan))
    return q.flatten(-2)[..., :k], scale.squeeze(-1)


def dequantize_activations(q: Tensor, scale: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    return (q.to(dtype) * scale.to(dtype).repeat_interleave(group_size, -1)[..., : q.shape[-1]]).to(dtype)


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


def quant_matmul(x: Tensor, w: QuantizedTensor, bias: Tensor | None = None, *, activations: str = "float") -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    seen = x.to(wide)
    if activations == "int8":
        group_size = activation_group(w.group_size)
        seen = round_activations(x, group_size, wide)
    y = seen @ w.dequantize(wide).T
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)
