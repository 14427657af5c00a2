"""The prompts' forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .decode import Decoder

__all__ = ["PREFILL_CHUNK", "prefill"]

# Tokens that go through the model at once: enough to keep matrix kernels busy, few enough that activations stay small.
PREFILL_CHUNK = 128


def prefill(model: Decoder, prompts: Sequence[Sequence[int]], cache: Any) -> Tensor:
    """Run the prompts into an empty cache; logits (B, V) after each one's last token.

    One prompt after the other: none is padded to the longest, and each gets the keys and values that it would get alone.
    """
    last = []
    for b, prompt in enumerate(prompts):
        row = cache.row(b)
        for start in range(0, len(prompt), PREFILL_CHUNK):
            ids = torch.tensor([prompt[start : start + PREFILL_CHUNK]], device=model.device)
            hidden = model.hidden_states(ids, row)[:, -1]
            row.lengths += ids.shape[1]
        last.append(hidden)
    return model.head(torch.cat(last))
