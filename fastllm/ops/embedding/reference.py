"""Rows of a table, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...quant.tensor import QuantizedTensor


def embedding(ids: Tensor, w: QuantizedTensor | Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    table = w.dequantize(torch.promote_types(dtype, torch.float32)) if isinstance(w, QuantizedTensor) else w
    return table[ids.long()].to(dtype)
