"""From logits to the next token: greedy, temperature, top-k, top-p, min-p, repetition penalty, seed. Nothing sorts the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import cpu_module
from ..errors import value_error

__all__ = ["Sampling", "draw_index", "first_maxima", "nucleus"]

ARGMAX_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the compiled module's


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Filters apply in the order of the fields, each to what the ones before have left.

    Args:
        repetition_penalty: logits of tokens already seen are divided by it if positive, multiplied if negative
            (Keskar et al. 2019, arXiv:1909.05858); 1 is none.
        temperature: divides the logits; 0 is greedy (the first of equal maxima), and the filters below do nothing.
        top_k: keep the k most likely tokens (and those that tie with the last).
        top_p: keep the smallest set of most likely tokens whose probabilities reach p, of equal ones the lowest ids (Holtzman et
            al. 2019, arXiv:1904.09751).
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

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def probabilities(self, logits: Tensor, seen: Sequence[int] = ()) -> Tensor:
        """logits (V,) of any float dtype -> the distribution (V,) fp32 that is drawn from; one-hot where greedy."""
        tokens, p = self._support(logits, seen)
        return p if tokens is None else torch.zeros(len(logits)).index_copy_(0, tokens, p)

    def draw(self, logits: Tensor, seen: Sequence[int], generator: torch.Generator) -> int:
        """The next token for logits (V,)."""
        if self.greedy:
            return first_maxima(self._penalised(logits, seen))[0]
        tokens, p = self._support(logits, seen)
        at = draw_index(p, generator)
        return at if tokens is None else int(tokens[at])

    def _penalised(self, logits: Tensor, seen: Sequence[int]) -> Tensor:
        logits = logits.float()
        if self.repetition_penalty == 1.0 or not len(seen):
            return logits
        index = torch.tensor(sorted(set(seen)))
        old = logits[index]
        penalised = torch.where(old > 0, old / self.repetition_penalty, old * self.repetition_penalty)
        return logits.index_copy(0, index, penalised)

    def _support(self, logits: Tensor, seen: Sequence[int]) -> tuple[Tensor | None, Tensor]:
        """The tokens (n,) that the filters leave, None for all of them, and their probabilities (n,) fp32."""
        logits = self._penalised(logits, seen)
        if self.greedy:
            return logits.argmax()[None], torch.ones(1)
        logits, tokens = logits / self.temperature, None
        if self.top_k is not None and self.top_k < len(logits):
            tokens = _top_k(logits, self.top_k)
            logits = logits[tokens]
        p = logits.softmax(-1)
        if self.top_p is not None and self.top_p < 1.0:
            tokens, p = _narrowed(tokens, p, nucleus(p, self.top_p))
        if self.min_p:
            tokens, p = _narrowed(tokens, p, (p >= self.min_p * p.max()).nonzero()[:, 0])
        return tokens, p


def first_maxima(logits: Tensor) -> list[int]:
    """The first of the largest of each row of logits (..., V), as ``argmax`` has it, for less than PyTorch takes after a step."""
    module = cpu_module()
    if module is not None and logits.is_cpu and logits.dtype in ARGMAX_DTYPES and logits.is_contiguous():
        return module.argmax(logits)  # type: ignore[no-any-return]
    return logits.argmax(-1).flatten().tolist()  # type: ignore[no-any-return]


def draw_index(weights: Tensor, generator: torch.Generator) -> int:
    """An index of weights (n,), not all zero, drawn in proportion to them: one uniform number, looked up in their running sum."""
    total = weights.cumsum(-1, dtype=torch.float64)
    # Divided by itself the last sum is 1, which no draw reaches, and an index of weight 0 never is the first above a draw.
    draw = torch.rand(1, dtype=torch.float64, generator=generator)
    return int(torch.searchsorted(total / total[-1], draw, right=True))


def nucleus(p: Tensor, top_p: float) -> Tensor:
    """The smallest set of likeliest entries of p (n,) fp32 that reaches top_p: their indices, ascending.

    Of equal entries the first ones are taken. Sums are fp64. Nothing is sorted: the bits of a float that is not negative are in
    the order of their values, so the mass by the upper 16 bits, and then by the lower 16, says at which value top_p is reached.
    """
    bits = p.view(torch.int32)
    upper, above = _reaching(bits >> 16, p, top_p)
    bucket = ((bits >> 16) == upper).nonzero()[:, 0]
    lower, above_here = _reaching(bits[bucket] & 0xFFFF, p[bucket], top_p - above)
    least = (upper << 16) + lower
    equal = bucket[bits[bucket] == least]
    # An entry stays if those before it do not reach top_p yet.
    before = above + above_here + torch.arange(len(equal), dtype=torch.float64) * p[equal[0]].double()
    keep = bits > least
    keep[equal[before < top_p]] = True
    return keep.nonzero()[:, 0]


def _reaching(key: Tensor, p: Tensor, top_p: float) -> tuple[int, float]:
    """From the largest of keys (n,) down, the one with which p's sum reaches top_p (else the least), and the sum above it."""
    least = int(key.min())
    mass = torch.bincount(key - least, weights=p).flip(0)
    total = mass.cumsum(0)
    at = min(int(torch.searchsorted(total, top_p)), len(mass) - 1)
    return least + len(mass) - 1 - at, float(total[at] - mass[at])


def _top_k(logits: Tensor, k: int) -> Tensor:
    """The indices, ascending, of the k largest of logits (V,), k < V, and of those that tie with the least of them."""
    values, tokens = logits.topk(k + 1)
    if values[k] < values[k - 1]:
        return tokens[:k].sort().values
    return (logits >= values[k - 1]).nonzero()[:, 0]


def _narrowed(tokens: Tensor | None, p: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of tokens and p (n,) at the indices ``kept``."""
    p = p[kept]
    return kept if tokens is None else tokens[kept], p / p.sum()
