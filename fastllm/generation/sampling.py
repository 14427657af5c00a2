"""From logits to the next token: greedy, temperature, top-k, top-p, min-p, repetition penalty, seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import value_error

__all__ = ["Sampling"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Filters apply in the order of the fields, each to what the ones before have left.

    Args:
        repetition_penalty: logits of tokens already seen are divided by it if positive, multiplied if negative
            (Keskar et al. 2019, arXiv:1909.05858); 1 is none.
        temperature: divides the logits; 0 is greedy (the first of equal maxima), and the filters below do nothing.
        top_k: keep the k most likely tokens (and those that tie with the last).
        top_p: keep the smallest set of most likely tokens whose probabilities reach p (Holtzman et al. 2019, arXiv:1904.09751).
        min_p: keep tokens at least min_p times as likely as the most likely one (Nguyen et al. 2024, arXiv:2407.01082).
        seed: of the draws; None takes one from PyTorch's default generator.

    Raises: ValueError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        def demand(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise value_error("generate", name, getattr(self, name), expected)

        demand(0.0 <= self.temperature < math.inf, "temperature", "a finite number of at least 0")
        demand(self.top_k is None or self.top_k >= 1, "top_k", "at least 1, or None for all")
        demand(self.top_p is None or 0.0 < self.top_p <= 1.0, "top_p", "more than 0 and at most 1, or None")
        demand(self.min_p is None or 0.0 <= self.min_p <= 1.0, "min_p", "from 0 to 1, or None")
        demand(0.0 < self.repetition_penalty < math.inf, "repetition_penalty", "a finite number above 0")

    def generator(self) -> torch.Generator:
        """The source of this call's draws."""
        seed = self.seed if self.seed is not None else int(torch.randint(2**62, ()))
        return torch.Generator().manual_seed(seed)

    def probabilities(self, logits: Tensor, seen: Sequence[int] = ()) -> Tensor:
        """logits (V,) of any float dtype -> the distribution (V,) fp32 that is drawn from; one-hot where greedy."""
        logits = logits.float()
        if self.repetition_penalty != 1.0 and len(seen):
            index = torch.tensor(sorted(set(seen)))
            old = logits[index]
            penalised = torch.where(old > 0, old / self.repetition_penalty, old * self.repetition_penalty)
            logits = logits.index_copy(0, index, penalised)
        if self.temperature == 0.0:
            return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < len(logits):
            least = logits.topk(self.top_k).values[-1]
            logits = logits.masked_fill(logits < least, -math.inf)
        if self.top_p is not None and self.top_p < 1.0:
            p, order = logits.softmax(-1).sort(descending=True)
            # A token stays if those before it do not reach p yet: the first one always does.
            dropped = order[p.cumsum(-1) - p >= self.top_p]
            logits = logits.index_fill(0, dropped, -math.inf)
        p = logits.softmax(-1)
        if self.min_p:
            p = p.masked_fill(p < self.min_p * p.max(), 0.0)
            p = p / p.sum()
        return p

    def draw(self, logits: Tensor, seen: Sequence[int], generator: torch.Generator) -> int:
        """The next token for logits (V,)."""
        if self.temperature == 0.0 and self.repetition_penalty == 1.0:
            return int(logits.argmax())
        p = self.probabilities(logits, seen)
        return int(p.argmax()) if self.temperature == 0.0 else int(torch.multinomial(p, 1, generator=generator))
