"""What cross_entropy promises beside the tolerance rule: no logits in memory, rows on their own, no help from autocast."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fastllm
from fastllm.backends import cpu_module

pytestmark = pytest.mark.skipif(cpu_module() is None, reason="fastllm._cpu is not built")

M, V, K = 3000, 20000, 24


def arguments(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(M, K, generator=g).to(dtype)
    return hidden, torch.randn(V, K, generator=g).to(dtype), torch.randint(V, (M,), generator=g)


def quantized(weight):
    return fastllm.quantize(weight.float(), 8, -1).pack()


def peak(call):
    """The most that PyTorch held at once of what it allocated while ``call`` ran, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = call()
    held = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    del result
    return most


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8 weight, float activations", "int8 weight, int8 activations"])
def test_logits_are_never_held(kind):
    hidden, weight, target = arguments(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    options = {}
    if "weight" in kind:
        weight, options = quantized(weight), {"activations": "int8" if "int8 activations" in kind else "float"}
    logits = M * V * 4
    most = peak(lambda: fastllm.cross_entropy(hidden, weight, target, **options))
    # 4 MiB of logits, twice where a new tile comes before the old one goes, and what grows with M or V alone.
    assert 4 << 20 <= most <= (8 << 20) + 100 * M + 4 * V * K
    with fastllm.use_backend("reference"):  # the test of the test
        assert peak(lambda: fastllm.cross_entropy(hidden, weight, target, **options)) >= logits


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_a_row_of_a_quantised_head_keeps_its_bits_in_any_batch(activations):
    """However many rows, and so however long the stretches of the vocabulary, a row is added up in the same order."""
    hidden, weight, target = arguments()
    weight = quantized(weight)
    whole = fastllm.cross_entropy(hidden, weight, target, activations=activations)
    for rows in (slice(0, 1), slice(500, 520), slice(0, 700), slice(2999, 3000)):
        alone = fastllm.cross_entropy(hidden[rows], weight, target[rows], activations=activations)
        assert torch.equal(alone, whole[rows])


def test_autocast_changes_nothing():
    hidden, weight, target = (t[:50] for t in arguments())
    expected = fastllm.cross_entropy(hidden, weight, target % 50)
    with torch.autocast("cpu"):
        assert torch.equal(fastllm.cross_entropy(hidden, weight, target % 50), expected)


def test_a_gradient_is_refused_in_words():
    hidden, weight, target = arguments()
    loss = fastllm.cross_entropy(hidden[:4].requires_grad_(), weight, target[:4], reduction="mean")
    with pytest.raises(NotImplementedError, match="cross_entropy: no gradient, because it keeps no logits"):
        loss.backward()


def test_infinite_logits():
    hidden = torch.tensor([[1.0], [-1.0]])
    weight = torch.tensor([[0.0], [torch.inf], [2.0]])
    low, high = [0, 0], [2, 2]
    assert fastllm.cross_entropy(hidden, weight, torch.tensor(low))[0] == torch.inf
    assert fastllm.cross_entropy(hidden, weight, torch.tensor(high))[1].isfinite()
    one = fastllm.cross_entropy(hidden, weight, torch.tensor([1, 1]))
    assert one[0].isnan()
    assert one[1] == torch.inf
