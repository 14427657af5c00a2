"""The generate loop: prompts of different lengths in one batch, tokens as they come, guessed ahead or one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..errors import value_error
from .decode import Decoder, DecodeStep, borrowed_cache
from .prefill import prefill
from .sampling import Sampling
from .speculative import DRAFT_TOKENS, Draft, Drafter, GenerationReport, checked

__all__ = ["generate_ids"]


def generate_ids(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    context: int,
    stop_ids: Sequence[int] = (),
    drafter: Drafter | None = None,
    draft_tokens: int = DRAFT_TOKENS,
    report: GenerationReport | None = None,
) -> Iterator[list[list[int]]]:
    """An iterator that yields, pass by pass, each sequence's next tokens: one, or with a drafter up to draft_tokens + 1; none once
    it has ended.

    A sequence ends after a stop token (which is not yielded), max_new_tokens, or the context's last position.

    Args:
        drafter: guesses tokens ahead, at most ``draft_tokens`` a pass; what comes out is what would come without it (``speculative``).
        report: is filled in.

    Raises: ValueError for an empty batch or prompt, a prompt longer than the context, max_new_tokens below 0, draft_tokens outside of
        1 to 15.
    """
    if max_new_tokens < 0:
        raise value_error("generate", "max_new_tokens", max_new_tokens, "at least 0")
    if not 1 <= draft_tokens <= 15:
        raise value_error("generate", "draft_tokens", draft_tokens, "from 1 to 15")
    if not prompts:
        raise value_error("generate", "prompts", list(prompts), "at least one prompt")
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= context:
            expected = f"1 to {context} tokens, the model's context"
            raise ValueError(f"generate: prompt {i} has {len(prompt)} tokens, expected {expected}")
    report = GenerationReport() if report is None else report
    return _generate(model, prompts, sampling, max_new_tokens, context, frozenset(stop_ids), drafter, draft_tokens, report)


def _generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int,
    context: int,
    stops: frozenset[int],
    drafter: Drafter | None,
    draft_tokens: int,
    report: GenerationReport,
) -> Iterator[list[list[int]]]:
    if max_new_tokens == 0:
        return
    # The prompt's pass gives a token even where the prompt fills the context.
    ends = [max(len(p) + 1, min(context, len(p) + max_new_tokens)) for p in prompts]
    capacity = min(context, max(ends) + (draft_tokens if drafter else 0))  # a pass may write guesses beyond the end
    seen = [list(p) for p in prompts]
    alive = list(range(len(seen)))
    generator = sampling.generator()
    with borrowed_cache(model, len(seen), capacity) as cache:
        # As an array, of the same memory: PyTorch would take tens of microseconds to write a number between steps.
        lengths = cache.lengths.numpy()
        steps: dict[int, DecodeStep] = {}  # by the number of tokens that they take of each sequence
        with torch.inference_mode():
            logits = prefill(model, prompts, cache)[:, None].cpu()  # (B, tokens, V), where the draws are made
        if drafter:
            drafter.start(prompts, sampling, generator, capacity)
        drafts = [Draft() for _ in seen]
        while True:
            new: list[list[int]] = [[] for _ in seen]
            for b in alive:
                tokens, accepted = checked(sampling, logits[b], seen[b], drafts[b], generator)
                new[b] = _until(stops, tokens)[: ends[b] - len(seen[b])]
                if len(new[b]) < len(tokens):
                    ends[b] = len(seen[b]) + len(new[b])
                report.passes += 1
                report.tokens += len(new[b])
                report.drafted += len(drafts[b].tokens)
                report.accepted += min(accepted, len(new[b]))
                seen[b] += new[b]
            if not any(new):
                return
            yield new
            alive = [b for b in alive if len(seen[b]) < ends[b]]
            if not alive:
                return
            # The last token of a sequence is not in the cache yet, nor is any guess that fell. A sequence that has ended goes on in the
            # batch, at the start of its slots: its output is never looked at.
            lengths[:] = 0
            for b in alive:
                lengths[b] = len(seen[b]) - 1
            drafts = [Draft() for _ in seen]
            if drafter and int(lengths.max()) + 1 + draft_tokens <= capacity:
                wanted = [0] * len(seen)
                for b in alive:
                    wanted[b] = min(draft_tokens, ends[b] - len(seen[b]) - 1)
                drafts = drafter.propose(seen, wanted)
            width = 1 + draft_tokens if any(d.tokens for d in drafts) else 1
            if width not in steps:
                steps[width] = DecodeStep(model, cache, width)
            ids = [[s[-1], *d.tokens, *[0] * (width - 1 - len(d.tokens))] for s, d in zip(seen, drafts)]
            logits = steps[width](ids).unflatten(0, (-1, width)).cpu()


def _until(stops: frozenset[int], tokens: list[int]) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in stops), None)]
