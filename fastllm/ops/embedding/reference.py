"""Rows of a table, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...quant.tensor import QuantizedTensor


def embedding(ids: Tensor, w: QuantizedTensor | Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    rows = w.shape[0]
    if ids.numel():
        low, high = (int(i) for i in ids.aminmax())
        if low < 0 or high >= rows:
            bad = low if low < 0 else high
            raise ValueError(f"embedding: ids holds {bad}, expected 0 to {rows - 1}, the rows of w")
    table = w.dequantize(torch.promote_types(dtype, torch.float32)) if isinstance(w, QuantizedTensor) else w
    return table[ids.long()].to(dtype)
