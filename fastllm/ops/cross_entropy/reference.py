"""The language model's loss in plain PyTorch: project, cap, log-softmax, pick the target.

Softcap: Gemma 2, arXiv:2408.00118. Never holding all logits: Wijmans et al. 2024, arXiv:2411.09009; this reference does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...quant.activations import activation_group
from ...quant.tensor import QuantizedTensor
from ..quant_matmul.reference import round_activations


def cross_entropy(
    hidden: Tensor,
    weight: Tensor | QuantizedTensor,
    target: Tensor,
    *,
    softcap: float | None = None,
    ignore_index: int = -100,
    activations: str = "float",
    reduction: str = "none",
) -> Tensor:
    check_target(target, weight.shape[0], ignore_index)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if isinstance(weight, QuantizedTensor):
        if activations == "int8":
            hidden = round_activations(hidden, activation_group(weight.group_size), wide)
        weight = weight.dequantize(wide)
    z = hidden.to(wide) @ weight.to(wide).T
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    ignored = target == ignore_index
    picked = z.gather(-1, target.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    return reduced((z.logsumexp(-1) - picked).masked_fill(ignored, 0.0), target, ignore_index, reduction)


def reduced(loss: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The losses themselves, their sum, or their mean over the targets that are not ignored (NaN where all are)."""
    if reduction == "none":
        return loss
    return loss.sum() / (target != ignore_index).sum() if reduction == "mean" else loss.sum()


def check_target(target: Tensor, rows: int, ignore_index: int) -> None:
    """Raises ValueError for a target that is neither a row of the weight nor ignored; it reads the values."""
    wrong = ((target < 0) | (target >= rows)) & (target != ignore_index)
    if bool(wrong.any()):
        bad = int(target[wrong][0])
        expected = f"0 to {rows - 1}, the rows of weight, or ignore_index {ignore_index}"
        raise ValueError(f"cross_entropy: target holds {bad}, expected {expected}")
