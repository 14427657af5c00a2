"""What the cases of ops that write int8 activations share: PyTorch's way of rounding, and wrong ways.

They are judged by the values that integers and scales stand for, against the float64 reference that never rounds to integers.
The yardstick is PyTorch's op in the working dtype, rounded as PyTorch's users round. That the integers and their sums are to the
bit those of the op's result rounded afterwards, tests/test_int8_activations.py says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..quant.activations import Int8Activations
from ..quant.rounding import TINY

__all__ = ["never_rounded", "rounded_by", "rounded_by_torch", "wrong_roundings"]

Op = Callable[..., Any]


def _scaled(y: Tensor, of: Tensor, group_size: int, to_integer: Callable[[Tensor], Tensor]) -> Int8Activations:
    """y in steps of max|of| / 127 a group."""
    k = y.shape[-1]
    y, of = (torch.nn.functional.pad(t, (0, -k % group_size)).unflatten(-1, (-(-k // group_size), group_size)) for t in (y, of))
    scale = of.abs().amax(-1, keepdim=True).clamp(min=TINY) / 127
    q = to_integer(y / scale).clamp(-127, 127)
    groups = torch.stack((scale.squeeze(-1), q.sum(-1)), -1).float()
    return Int8Activations(q.flatten(-2)[..., :k].to(torch.int8), groups, group_size, y.dtype)


def rounded_by_torch(y: Tensor, group_size: int) -> Int8Activations:
    """What a PyTorch user would write."""
    wide = y.float()
    return replace(_scaled(wide, wide, group_size, torch.round), dtype=y.dtype)


def rounded_by(op: Op, rounded: Callable[[Tensor, int], Any] = rounded_by_torch) -> Op:
    """The op in its dtype, then its first result rounded."""

    def call(*, int8_group: int, **inputs: Any) -> Any:
        y = op(**inputs)
        return (rounded(y[0], int8_group), *y[1:]) if isinstance(y, tuple) else rounded(y, int8_group)

    return call


def never_rounded(op: Op) -> Op:
    """The op itself: its values are what every rounding is to be near."""
    return rounded_by(op, lambda y, _: y)


def wrong_roundings(op: Op, other: Op) -> dict[str, Op]:
    """Mutants of a float64 reference. ``other`` takes the same arguments and returns what a wrong scale could be of."""

    def cut_off(y: Tensor, group_size: int) -> Int8Activations:
        return _scaled(y, y, group_size, torch.trunc)

    def one_scale(y: Tensor, group_size: int) -> Int8Activations:
        largest = y.abs().amax(-1, keepdim=True) if y.numel() else y
        return _scaled(y, largest.expand_as(y), group_size, torch.round)

    def shifted(y: Tensor, group_size: int) -> Int8Activations:
        right = rounded_by_torch(y, group_size)
        return replace(right, groups=right.groups.roll(1, -2))

    def of_other(*, int8_group: int, **inputs: Any) -> Any:
        def wrong(y: Tensor, group_size: int) -> Int8Activations:
            return _scaled(y, other(**inputs), group_size, torch.round)

        return rounded_by(op, wrong)(int8_group=int8_group, **inputs)

    return {
        "integers are cut off, not rounded": rounded_by(op, cut_off),
        "one scale serves all groups of a row": rounded_by(op, one_scale),
        "scales are shifted by one group": rounded_by(op, shifted),
        "the scale is of the values before the last product": of_other,
    }
