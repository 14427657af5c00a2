"""Speculative decoding: the same tokens greedily, the same distribution sampled, whoever guesses; and batches."""

from __future__ import annotations

import contextlib
import itertools
import math
from copy import copy

import pytest
import torch

from fastllm.generation import loop
from fastllm.generation.loop import generate_ids
from fastllm.generation.sampling import Sampling, draw_index
from fastllm.generation.speculative import Draft, DraftModel, GenerationReport, PromptLookup, checked


class Table:
    """A model whose next token depends on the last two alone. It reads them from its cache, and so sees a slot that was not rolled back."""

    class Cache:
        def __init__(self, batch, capacity):
            self.lengths = torch.zeros(batch, dtype=torch.int64)
            self.capacity = capacity
            self.slots = torch.full((batch, capacity), -1)

        def row(self, b):
            one = copy(self)
            one.lengths, one.slots = self.lengths[b : b + 1], self.slots[b : b + 1]
            return one

    device = torch.device("cpu")
    kernel_calls = 3  # none of which it makes
    prefill_tokens = 128

    def __init__(self, vocab, seed):
        self.table = 1.5 * torch.randn(vocab, vocab, vocab, generator=torch.Generator().manual_seed(seed))

    def query_runs(self, tokens):
        return 1

    def new_cache(self, batch, capacity):
        self.cache = self.Cache(batch, capacity)
        return self.cache

    def give_back(self, cache):
        assert cache is self.cache
        self.given_back = getattr(self, "given_back", 0) + 1

    def scratch(self):
        return contextlib.nullcontext()

    def hidden_states(self, ids, cache, places=None, *, last=False):
        at = cache.lengths[:, None] + torch.arange(ids.shape[1])
        assert int(at.max()) < cache.capacity
        cache.slots.scatter_(1, at, ids)
        before = cache.slots.gather(1, (at - 1).clamp_min(0)).clamp_min(0)
        return torch.stack([before, ids], -1)

    def head(self, hidden):
        return self.table[hidden[..., 0], hidden[..., 1]]


def run(model, prompts, sampling=None, *, max_new_tokens, context=1000, **options):
    report = GenerationReport()
    out = [[] for _ in prompts]
    options |= {"max_new_tokens": max_new_tokens, "context": context, "report": report}
    for new in generate_ids(model, prompts, sampling or Sampling(), **options):
        assert any(new)
        for tokens, more in zip(out, new):
            tokens += more
    return out, report


def drafters(vocab):
    return {"lookup": PromptLookup(), "model": DraftModel(Table(vocab, 2), 1000), "itself": DraftModel(Table(vocab, 1), 1000)}


PROMPTS = [[1, 2, 3, 1, 2, 3, 1, 2], [5], [4, 4, 0, 4, 4]]


# ---------------------------------------------------------------- greedy


@pytest.mark.parametrize("draft_tokens", [1, 3, 7])
@pytest.mark.parametrize("kind", drafters(8))
def test_greedy_tokens_are_those_of_plain_decoding(kind, draft_tokens):
    """With a small vocabulary texts soon go round, so that lookup has hits; the other model gives it misses."""
    accepted = 0
    for seed in range(1, 6):
        model = Table(8, seed)
        plain, _ = run(model, PROMPTS, max_new_tokens=40)
        found, report = run(model, PROMPTS, max_new_tokens=40, drafter=drafters(8)[kind], draft_tokens=draft_tokens)
        assert found == plain
        for b, prompt in enumerate(PROMPTS):  # the cache was rolled back: all but the last token lie where they belong
            text = prompt + found[b]
            lengths = model.cache.lengths
            assert model.cache.slots[b, : lengths[b]].tolist() == text[: lengths[b]]
        assert report.tokens == 120
        assert report.passes == report.tokens - report.accepted
        if kind == "itself" and seed == 1:
            assert report.accepted == report.drafted
        accepted += report.accepted
    assert accepted


@pytest.mark.parametrize("kind", drafters(8))
def test_sequences_end_separately_and_where_they_would_alone(kind):
    model = Table(8, 3)
    for stop, context, max_new_tokens in itertools.product(range(8), (9, 12, 1000), (1, 2, 5, 30)):
        options = {"stop_ids": [stop], "context": context, "max_new_tokens": max_new_tokens}
        alone = [run(model, [prompt], **options)[0][0] for prompt in PROMPTS]
        assert run(model, PROMPTS, **options)[0] == alone
        assert run(model, PROMPTS, drafter=drafters(8)[kind], **options)[0] == alone


def test_a_draft_model_of_a_shorter_context_guesses_until_it_is_full():
    model = Table(8, 1)
    plain, _ = run(model, PROMPTS, max_new_tokens=40)
    found, report = run(model, PROMPTS, max_new_tokens=40, drafter=DraftModel(Table(8, 1), 20))
    assert found == plain
    assert report.accepted == report.drafted
    _, none = run(model, [[1] * 30], max_new_tokens=4, drafter=DraftModel(Table(8, 1), 20))
    assert none.drafted == 0
    # 12, 19 and 15 tokens more fit, give or take the last pass of each
    assert 24 <= report.drafted <= 46


@pytest.mark.parametrize("draft_tokens", [0, 16])
def test_the_number_of_guesses_is_checked(draft_tokens):
    with pytest.raises(ValueError, match=f"draft_tokens is {draft_tokens}, expected from 1 to 15"):
        generate_ids(Table(8, 1), [[1]], Sampling(), max_new_tokens=1, context=9, draft_tokens=draft_tokens)


# ---------------------------------------------------------------- lookup


def lookup(seen, wanted=3):
    drafter = PromptLookup()
    drafter.start([seen], Sampling(), torch.Generator(), 100)
    (draft,) = drafter.propose([seen], [wanted])
    return draft.tokens


def test_lookup_continues_the_longest_match_where_it_was_last_seen():
    assert lookup([1, 2, 7, 8, 9, 5, 1, 2]) == [7, 8, 9]
    assert lookup([1, 2, 7, 1, 2, 8, 1, 2]) == [8, 1, 2]  # the last time
    assert lookup([3, 1, 2, 7, 0, 1, 2, 8, 3, 1, 2]) == [7, 0, 1]  # three tokens count for more than the last time
    assert lookup([6, 6, 6]) == [6, 6, 6]
    assert lookup([4, 5, 4, 5], 5) == [4, 5, 4, 5, 4]  # beyond the end it goes round
    assert lookup([1, 2, 3, 2]) == []  # one token is no match
    assert lookup([1]) == []
    assert lookup([1, 2, 7, 8, 9, 5, 1, 2], 0) == []


def test_lookup_indexes_what_has_come_since():
    drafter = PromptLookup()
    seen = [1, 2, 3]
    drafter.start([seen], Sampling(), torch.Generator(), 100)
    assert drafter.propose([seen], [3])[0].tokens == []
    assert drafter.propose([[*seen, 9, 1, 2]], [3])[0].tokens == [3, 9, 1]
    assert drafter.propose([[*seen, 9, 1, 2, 4, 1, 2]], [3])[0].tokens == [4, 1, 2]


# ---------------------------------------------------------------- sampled


def chi_squared_excess(model, prompt, sampling, count, new_tokens, **options):
    """Pearson's statistic of the texts drawn, over the value that it exceeds once in a thousand times (Wilson and Hilferty 1931)."""
    vocab = len(model.table)
    texts, _ = run(model, [prompt] * count, sampling, max_new_tokens=new_tokens, **options)
    found = torch.zeros([vocab] * new_tokens)
    for text in texts:
        found[tuple(text)] += 1
    expected = torch.zeros([vocab] * new_tokens, dtype=torch.float64)
    for text in itertools.product(range(vocab), repeat=new_tokens):
        seen, p = list(prompt), 1.0
        for token in text:
            p *= float(sampling.probabilities(model.table[seen[-2], seen[-1]], seen)[token])
            seen.append(token)
        expected[text] = count * p
    if found[expected == 0].any():
        return math.inf
    rare = expected < 5  # together one cell: a small count is not normal
    found, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (found.double(), expected))
    found, expected = found[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    return float(((found - expected) ** 2 / expected).sum()) / limit


# Every pair of tokens occurs, so that lookup always has a guess.
PAIRS = [0, 0, 1, 0, 2, 1, 1, 2, 2, 0]
SAMPLINGS = [
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=1.5, top_p=0.9, repetition_penalty=1.3, seed=2),
    Sampling(temperature=0.8, top_k=2, seed=3),
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("kind", ["lookup", "model"])
def test_sampled_texts_keep_their_distribution(kind, sampling):
    count = 1500 if sampling is SAMPLINGS[0] else 600  # filters take time
    assert chi_squared_excess(Table(3, 3), PAIRS, sampling, count, 4, drafter=drafters(3)[kind], draft_tokens=2) < 1


def all_stay(sampling, logits, seen, draft, generator):
    out = [*draft.tokens, sampling.draw(logits[len(draft.tokens)], [*seen, *draft.tokens], generator)]
    return out, len(draft.tokens)


def redrawn_from_p(sampling, logits, seen, draft, generator):
    out, accepted = checked(sampling, logits, seen, draft, generator)
    out[accepted] = sampling.draw(logits[accepted], [*seen, *out[:accepted]], generator)
    return out, accepted


def redrawn_without_q(sampling, logits, seen, draft, generator):
    """What falls is drawn from what is left of p without it, as is right for a point mass only."""
    out, accepted = checked(sampling, logits, seen, draft, generator)
    if accepted < len(draft.tokens):
        p = sampling.probabilities(logits[accepted], [*seen, *out[:accepted]])
        p[draft.tokens[accepted]] = 0.0
        out[accepted] = draw_index(p, generator)
    return out, accepted


@pytest.mark.parametrize(
    ("kind", "mutant"),
    [
        ("lookup", all_stay),
        ("model", all_stay),
        ("lookup", redrawn_from_p),
        ("model", redrawn_from_p),
        ("model", redrawn_without_q),
    ],
)
def test_wrong_rules_are_noticed(kind, mutant, monkeypatch):
    monkeypatch.setattr(loop, "checked", mutant)
    assert chi_squared_excess(Table(3, 3), PAIRS, SAMPLINGS[0], 1500, 4, drafter=drafters(3)[kind], draft_tokens=2) > 1


def test_a_model_that_guesses_for_itself_is_always_right():
    for sampling in SAMPLINGS:
        _, report = run(Table(8, 1), PROMPTS, sampling, max_new_tokens=30, drafter=drafters(8)["itself"])
        assert report.accepted == report.drafted > 0


def test_a_token_that_falls_by_rounding_alone_is_drawn_again():
    """p is below q in one place and above it nowhere, as two sums' rounding can have it: max(0, p - q) leaves nothing."""
    p = torch.tensor([0.5, 0.25])
    draft = Draft([1], [torch.tensor([0.5, 0.5])])

    class Given(Sampling):
        def probabilities(self, logits, seen=()):
            return p

    outcomes = [
        checked(Given(temperature=1.0), torch.zeros(2, 2), [0], draft, torch.Generator().manual_seed(s)) for s in range(40)
    ]
    fell = [out for out, accepted in outcomes if accepted == 0]
    assert {out[0] for out in fell} == {0, 1}
    assert len(fell) < 40


def test_the_report_in_words():
    report = GenerationReport(tokens=30, passes=12, drafted=24, accepted=18)
    assert str(report) == "30 tokens in 12 passes, 2.50 a pass; 18 of 24 drafted tokens accepted, 75%"
    assert str(GenerationReport()) == "0 tokens in 0 passes, 0.00 a pass; 0 of 0 drafted tokens accepted, 0%"
