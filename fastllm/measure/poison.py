"""Outputs that come poisoned, with guards on both sides: what a kernel forgets to write, or writes too much, is seen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..ops import _op

__all__ = ["Poisoned", "poisoned"]

GUARD = 64  # elements: 64 to 512 bytes on each side
_BYTE = 0x5A  # for integers, which have no NaN


class Poisoned:
    """The memory handed out as outputs while the context lasts."""

    def __init__(self) -> None:
        self._handed_out: list[Tensor] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """In place of ``_op.empty``: NaN (0x5A in integers), and as many guards before and after."""
        size = torch.Size(shape)
        fill = float("nan") if dtype.is_floating_point else (True if dtype == torch.bool else _BYTE)
        memory = torch.full((size.numel() + 2 * GUARD,), fill, dtype=dtype, device=device)
        self._handed_out.append(memory)
        return memory[GUARD : GUARD + size.numel()].view(size)

    def overrun(self) -> str:
        """What was written outside of an output since the last call, in words; empty if nothing."""
        found = ""
        for memory in self._handed_out:
            for guard, where in ((memory[:GUARD], "before"), (memory[-GUARD:], "after")):
                intact = guard.isnan() if guard.dtype.is_floating_point else guard == guard.new_full((), _BYTE)
                if not bool(intact.all()):
                    size = memory.numel() - 2 * GUARD
                    found = f"{int((~intact).sum())} elements {where} an output of {size} {memory.dtype} were overwritten"
        self._handed_out.clear()
        return found

    def check(self) -> None:
        """For tests: a write outside of an output is an AssertionError."""
        found = self.overrun()
        if found:
            raise AssertionError(f"a kernel wrote outside of its output: {found}")


@contextlib.contextmanager
def poisoned() -> Iterator[Poisoned]:
    """Every output that an op allocates through ``_op.empty`` in this context is poisoned and guarded."""
    before, memory = _op.empty, Poisoned()
    _op.empty = memory.empty
    try:
        yield memory
    finally:
        _op.empty = before
