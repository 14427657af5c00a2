"""The generate loop: prompts of different lengths in one batch, tokens as they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import value_error
from .decode import Decoder, DecodeStep
from .sampling import Sampling

__all__ = ["PREFILL_CHUNK", "generate_ids", "prefill"]

# Tokens that go through the model at once: enough to keep matrix kernels busy, few enough that activations stay small.
PREFILL_CHUNK = 128


def prefill(model: Decoder, prompts: Sequence[Sequence[int]], cache: Any) -> Tensor:
    """Run the prompts into an empty cache; logits (B, V) after each one's last token.

    Shorter prompts are padded on the right. Causal attention never looks right, and decoding overwrites the padded slots one by
    one before it makes them visible, so padding needs no mask.
    """
    lengths = torch.tensor([len(p) for p in prompts])
    longest = int(lengths.max())
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in zip(ids, prompts):
        row[: len(prompt)] = torch.tensor(prompt)
    last = []
    for start in range(0, longest, PREFILL_CHUNK):
        stop = min(start + PREFILL_CHUNK, longest)
        cache.lengths.fill_(start)
        hidden = model.hidden_states(ids[:, start:stop].to(model.device), cache)
        last += [(b, hidden[b, n - 1 - start]) for b, n in enumerate(lengths.tolist()) if start < n <= stop]
    cache.lengths.copy_(lengths)
    return model.head(torch.stack([row for _, row in sorted(last, key=lambda item: item[0])]))


def generate_ids(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    context: int,
    stop_ids: Sequence[int] = (),
) -> Iterator[list[int | None]]:
    """An iterator that yields, step by step, each sequence's next token, or None once it has ended.

    A sequence ends after a stop token (which is not yielded), max_new_tokens, or the context's last position.

    Raises: ValueError for an empty batch or prompt, a prompt longer than the context, max_new_tokens below 0.
    """
    if max_new_tokens < 0:
        raise value_error("generate", "max_new_tokens", max_new_tokens, "at least 0")
    if not prompts:
        raise value_error("generate", "prompts", list(prompts), "at least one prompt")
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= context:
            expected = f"1 to {context} tokens, the model's context"
            raise ValueError(f"generate: prompt {i} has {len(prompt)} tokens, expected {expected}")
    return _generate(model, prompts, sampling, max_new_tokens, context, frozenset(stop_ids))


def _generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int,
    context: int,
    stops: frozenset[int],
) -> Iterator[list[int | None]]:
    if max_new_tokens == 0:
        return
    seen = [list(p) for p in prompts]
    alive = [True] * len(seen)
    generator = sampling.generator()
    cache = model.new_cache(len(seen), min(context, max(map(len, seen)) + max_new_tokens))
    decode = DecodeStep(model, cache)
    with torch.inference_mode():
        logits = prefill(model, prompts, cache).cpu()  # where the draws are made
    for step in range(1, max_new_tokens + 1):
        tokens: list[int | None] = [None] * len(seen)
        for b in range(len(seen)):
            if alive[b]:
                token = sampling.draw(logits[b], seen[b], generator)
                alive[b] = token not in stops
                if alive[b]:
                    tokens[b] = token
                    seen[b].append(token)
        if not any(alive):
            return
        yield tokens
        alive = [on and len(s) < context for on, s in zip(alive, seen)]
        if step == max_new_tokens or not any(alive):
            return
        # A sequence that has ended goes on in the batch, over its own last slot: its output is never looked at.
        logits = decode([s[-1] for s in seen]).cpu()
        cache.lengths += torch.tensor(alive, dtype=torch.int64)
