"""Speculative decoding: cheap guesses at the next tokens, which one forward pass of the model checks together.

Leviathan et al. 2023, https://arxiv.org/abs/2211.17192: a drafted token x stays with probability min(1, p(x) / q(x)), p being what the
model would have drawn from and q what x was drawn from; the first one that falls is drawn anew from max(0, p - q), normalised. What
comes out is distributed as if the model had drawn every token itself; greedily it is what the model itself would have taken.
Prompt lookup is Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding: what followed when the last words were last said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .decode import Decoder, DecodeStep
from .prefill import prefill
from .sampling import Sampling, draw_index

__all__ = ["DRAFT_TOKENS", "Draft", "DraftModel", "Drafter", "GenerationReport", "PromptLookup", "checked"]

# On two cores of a Zen 3 a pass of 4 tokens of SmolLM2-135M costs 1.3 to 1.5 passes of one, and one of 8 costs 2.3 to 2.9. So 3
# drafted tokens pay from an acceptance rate of about 0.3 on, and 7 are better only above 0.95.
DRAFT_TOKENS = 3


@dataclass(frozen=True)
class Draft:
    """Guesses at a sequence's next tokens.

    Args:
        tokens: n of them.
        probabilities: for each the distribution (V,) fp32 that it was drawn from; none where it is a point mass.
    """

    tokens: list[int] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)


class Drafter(Protocol):
    """Where guesses come from."""

    def start(self, prompts: Sequence[Sequence[int]], sampling: Sampling, generator: torch.Generator, capacity: int) -> None:
        """A new batch, of sequences of at most ``capacity`` tokens."""

    def propose(self, seen: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[Draft]:
        """At most ``wanted[b]`` tokens to follow ``seen[b]``, which begins with what it was before and has at least one more."""


@dataclass
class GenerationReport:
    """What a call of generate did; it adds up over calls.

    Args:
        tokens: given to the caller, stop tokens not among them.
        passes: forward passes that tokens came from, the prompt's own among them, counted for each sequence.
        drafted, accepted: tokens that were guessed, and those of them that stayed.
    """

    tokens: int = 0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / self.passes if self.passes else 0.0

    @property
    def acceptance_rate(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0

    def __str__(self) -> str:
        text = f"{self.tokens} tokens in {self.passes} passes, {self.tokens_per_pass:.2f} a pass"
        return f"{text}; {self.accepted} of {self.drafted} drafted tokens accepted, {100 * self.acceptance_rate:.0f}%"


def checked(
    sampling: Sampling, logits: Tensor, seen: Sequence[int], draft: Draft, generator: torch.Generator
) -> tuple[list[int], int]:
    """The tokens that a pass gives, and how many of them were drafted: those that stay, and one more.

    Args:
        logits: (n + 1 or more, V), after the last token of ``seen`` and after each of the n drafted ones.
    """
    out: list[int] = []
    for i, token in enumerate(draft.tokens):
        if sampling.greedy:
            out.append(sampling.draw(logits[i], [*seen, *out], generator))
            if out[-1] != token:
                return out, i
            continue
        p = sampling.probabilities(logits[i], [*seen, *out])
        q = draft.probabilities[i] if draft.probabilities else torch.zeros_like(p).index_fill_(0, torch.tensor(token), 1.0)
        if float(torch.rand(1, dtype=torch.float64, generator=generator)) * float(q[token]) < float(p[token]):
            out.append(token)
            continue
        rest = (p - q).clamp_min_(0.0)
        # Where p and q differ by rounding alone, nothing may be left.
        out.append(draw_index(rest if rest.any() else p, generator))
        return out, i
    out.append(sampling.draw(logits[len(out)], [*seen, *out], generator))
    return out, len(draft.tokens)


class PromptLookup:
    """Guesses that what followed the last n tokens the last time will follow them again, for the largest n that has been seen.

    Args:
        longest, shortest: n. A shorter match guesses more often, and more often in vain.
    """

    def __init__(self, longest: int = 3, shortest: int = 2) -> None:
        self._sizes = range(longest, shortest - 1, -1)

    def start(self, prompts: Sequence[Sequence[int]], sampling: Sampling, generator: torch.Generator, capacity: int) -> None:
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in prompts]  # n-gram -> where its last occurrence ended
        self._indexed = [0] * len(prompts)

    def propose(self, seen: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[Draft]:
        return [Draft(self._follow(b, tokens, n)) if n else Draft() for b, (tokens, n) in enumerate(zip(seen, wanted))]

    def _follow(self, b: int, seen: Sequence[int], wanted: int) -> list[int]:
        after = self._after[b]
        for end in range(self._indexed[b] + 1, len(seen)):  # not what ends with the last token: it would find itself
            for n in self._sizes:
                if n <= end:
                    after[tuple(seen[end - n : end])] = end
        self._indexed[b] = len(seen) - 1
        for n in self._sizes:
            at = after.get(tuple(seen[-n:])) if n <= len(seen) else None
            if at is not None:
                period = len(seen) - at  # beyond the end, the text is guessed to go round
                return [seen[at + i % period] for i in range(wanted)]
        return []


class DraftModel:
    """Guesses what a smaller model of the same vocabulary would say.

    Args:
        model: its forward pass.
        context: most tokens that it can see; longer sequences get no guesses.
    """

    def __init__(self, model: Decoder, context: int) -> None:
        self._model, self._context = model, context

    def start(self, prompts: Sequence[Sequence[int]], sampling: Sampling, generator: torch.Generator, capacity: int) -> None:
        self._sampling, self._generator = sampling, generator
        self._capacity = min(capacity, self._context)
        self._cache = self._model.new_cache(len(prompts), self._capacity)
        self._step = DecodeStep(self._model, self._cache)
        with torch.inference_mode():
            prefill(self._model, [p[: self._capacity] for p in prompts], self._cache)
        self._guessed: list[list[int]] = [[] for _ in prompts]  # what the cache holds beyond what was known

    def propose(self, seen: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[Draft]:
        lengths, drafts = self._cache.lengths, [Draft() for _ in seen]
        fed = lengths.tolist()
        for b, guessed in enumerate(self._guessed):  # keep the guesses that came true
            pairs = zip(guessed, seen[b][fed[b] : -1])
            fed[b] += next(
                (i for i, (guess, token) in enumerate(pairs) if guess != token), min(len(guessed), len(seen[b]) - 1 - fed[b])
            )
        # One step feeds each sequence its next token: first what it has not seen yet, then its own guesses.
        wanted = [min(n, self._capacity + 1 - len(s)) for s, n in zip(seen, wanted)]
        busy = [b for b, n in enumerate(wanted) if n > 0]
        while busy:
            ids = [0] * len(seen)
            for b in busy:
                ids[b] = seen[b][fed[b]] if fed[b] < len(seen[b]) else drafts[b].tokens[fed[b] - len(seen[b])]
            lengths.copy_(torch.tensor(fed))
            # A sequence that has no token to feed writes into the slot after its last, which nothing reads.
            lengths.clamp_max_(self._capacity - 1)
            logits = self._step(ids).cpu()
            for b in busy:
                fed[b] += 1
                if fed[b] >= len(seen[b]):
                    self._guess(logits[b], seen[b], drafts[b])
            busy = [b for b in busy if len(drafts[b].tokens) < wanted[b]]
        for b, tokens in enumerate(seen):
            lengths[b] = min(fed[b], len(tokens))
            self._guessed[b] = drafts[b].tokens[: max(0, fed[b] - len(tokens))]
        return drafts

    def _guess(self, logits: Tensor, seen: Sequence[int], draft: Draft) -> None:
        context = [*seen, *draft.tokens]
        if self._sampling.greedy:
            draft.tokens.append(self._sampling.draw(logits, context, self._generator))
            return
        q = self._sampling.probabilities(logits, context)
        draft.tokens.append(draw_index(q, self._generator))
        draft.probabilities.append(q)
