"""Does a fast model still say the same? Perplexity on a text, and token-by-token agreement with a model that is trusted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..errors import value_error

__all__ = ["Agreement", "agreement", "losses_of", "perplexity", "windows"]

Logits = Callable[[Tensor], Tensor]  # ids (1, T) -> (1, T, V)
Losses = Callable[[Tensor], Tensor]  # ids (1, T) -> negative log-likelihoods (1, T - 1) in nats

# Rows of the vocabulary's size handled at once: 64 rows of 50k fp64 numbers are 25 MB.
_ROWS = 64


def windows(ids: Sequence[int], length: int = 512, tokens: int = 1024) -> list[Tensor]:
    """The first ``tokens`` ids as independent windows (1, length).

    Raises: ValueError if there are fewer.
    """
    if len(ids) < tokens or tokens < length:
        raise value_error("windows", "text length in tokens", len(ids), f"at least {max(tokens, length)}")
    return [torch.tensor([ids[at : at + length]]) for at in range(0, tokens - length + 1, length)]


def perplexity(losses: Losses, texts: Sequence[Tensor]) -> float:
    """exp of the mean negative log-likelihood (nats) of each window's tokens but the first, given those before it.

    Args:
        losses: of those tokens: ``LanguageModel.losses``, or ``losses_of`` a model's logits.
        texts: ``windows`` of token ids.
    """
    total, count = 0.0, 0
    for ids in texts:
        loss = losses(ids)
        total += float(loss.double().sum())
        count += loss.numel()
    return math.exp(total / count)


def losses_of(logits: Logits) -> Losses:
    """What ``perplexity`` takes, of a model that gives logits: another library's, or one whose logits are held anyway."""

    def losses(ids: Tensor) -> Tensor:
        parts = zip(logits(ids)[0, :-1].split(_ROWS), ids[0, 1:].split(_ROWS))
        found = [-part.double().log_softmax(-1).gather(1, target[:, None]) for part, target in parts]
        return torch.cat(found).view(1, -1)

    return losses


@dataclass(frozen=True)
class Agreement:
    """How two models' next-token predictions compare over the same tokens.

    Args:
        top1: share of positions whose most likely token is the same.
        top1_clear: the same, where the trusted model's first choice leads its second by more than 0.5 in logits; rounding
            cannot honestly change those.
        clear: how many positions that is; positions: how many there are.
        mean_kl: mean Kullback-Leibler divergence, trusted from ours, in nats.
        max_logit_error: largest difference of a logit.
        rms_logit_error: root of the mean squared difference.
    """

    top1: float
    top1_clear: float
    clear: int
    positions: int
    mean_kl: float
    max_logit_error: float
    rms_logit_error: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def agreement(trusted: Iterator[Tensor], ours: Iterator[Tensor]) -> Agreement:
    """Compare two streams of logits (rows, V), teacher-forced over the same text, in float64."""
    same = same_clear = clear = positions = elements = 0
    kl = squares = worst = 0.0
    for reference, got in zip(trusted, ours, strict=True):
        for r, g in zip(reference.split(_ROWS), got.split(_ROWS), strict=True):
            r, g = r.double(), g.double()
            top = r.topk(2).values
            is_clear = top[:, 0] - top[:, 1] > 0.5
            agrees = r.argmax(-1) == g.argmax(-1)
            same += int(agrees.sum())
            same_clear += int((agrees & is_clear).sum())
            clear += int(is_clear.sum())
            positions += len(r)
            log_r = r.log_softmax(-1)
            kl += float((log_r.exp() * (log_r - g.log_softmax(-1))).sum())
            difference = (r - g).abs()
            worst = max(worst, float(difference.max()))
            squares += float(difference.square().sum())
            elements += r.numel()
    return Agreement(
        top1=same / positions,
        top1_clear=same_clear / clear if clear else 1.0,
        clear=clear,
        positions=positions,
        mean_kl=kl / positions,
        max_logit_error=worst,
        rms_logit_error=math.sqrt(squares / elements),
    )
