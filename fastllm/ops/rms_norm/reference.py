"""RMSNorm in plain PyTorch (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...quant.activations import Int8Activations


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    offset: float = 0.0,
    rounding: str = "llama",
    int8_group: int | None = None,
) -> Any:
    h = x if residual is None else x + residual
    wide = h.float() if h.dtype in (torch.float16, torch.bfloat16) else h
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is None:
        y = normed.to(x.dtype)
    elif rounding == "llama":
        y = (normed.to(x.dtype).to(wide.dtype) * (weight.to(wide.dtype) + offset)).to(x.dtype)
    else:
        y = (normed * (weight.to(wide.dtype) + offset)).to(x.dtype)
    result = y if int8_group is None else Int8Activations.of(y, int8_group)
    return result if residual is None else (result, h)
