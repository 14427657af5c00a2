"""Every output that an op allocates comes poisoned, with guards on both sides."""

from __future__ import annotations

import pytest
import torch

from fastllm.ops import _op

GUARD = 64  # elements


@pytest.fixture
def poisoned(monkeypatch):
    """Outputs are NaN before the kernel runs; ``check()`` finds writes outside of them."""
    handed_out = []

    def empty(shape, *, dtype, device=None):
        count = torch.Size(shape).numel()
        fill = float("nan") if dtype.is_floating_point else 0x5A
        memory = torch.full((count + 2 * GUARD,), fill, dtype=dtype, device=device)
        handed_out.append(memory)
        return memory[GUARD : GUARD + count].view(shape)

    monkeypatch.setattr(_op, "empty", empty)

    class Poisoned:
        @staticmethod
        def check():
            for memory in handed_out:
                for guard in (memory[:GUARD], memory[-GUARD:]):
                    intact = guard.isnan() if guard.dtype.is_floating_point else guard == 0x5A
                    assert bool(intact.all()), "a kernel wrote outside of its output"

    return Poisoned
