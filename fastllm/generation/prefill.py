"""The prompts' forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .decode import Decoder

__all__ = ["prefill"]


def prefill(model: Decoder, prompts: Sequence[Sequence[int]], cache: Any) -> Tensor:
    """Run the prompts into an empty cache; logits (B, V) after each one's last token.

    One prompt after the other: none is padded to the longest, and each gets the keys and values that it would get alone.
    """
    last, chunk = [], model.prefill_tokens
    for b, prompt in enumerate(prompts):
        row = cache.row(b)
        for start in range(0, len(prompt), chunk):
            ids = torch.tensor([prompt[start : start + chunk]], device=model.device)
            hidden = model.hidden_states(ids, row, last=True)[:, -1]
            row.lengths += ids.shape[1]
        last.append(hidden)
    return model.head(torch.cat(last))
