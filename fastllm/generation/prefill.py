"""The prompts' forward passes, recorded on the CPU and replayed as decode steps are.

Between a pass's kernels Python takes tens of microseconds each, when they have driven it out of the caches. The pieces of a long prompt are
passes of the same length in the same memory, and so are prompts of one length whose caches have the same memory: the second such
pass is written down, later ones repeat its calls. Only a pass of kernels alone can be; see ``fastllm.generation.decode``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import cpu_module, forced_backend
from ..nn.cache import Places
from ..pages import Piece, Scratch
from .decode import Decoder

__all__ = ["prefill"]

KEPT_PASSES = 4  # of different lengths, in a cache's memory


def prefill(model: Decoder, prompts: Sequence[Sequence[int]], cache: Any) -> Tensor:
    """Run the prompts into an empty cache; logits (B, V) after each one's last token.

    One prompt after the other: none is padded to the longest, and each gets the keys and values that it would get alone.
    """
    last, chunk, module = [], model.prefill_tokens, cpu_module()
    with model.scratch() as memory:
        for b, prompt in enumerate(prompts):
            row = cache.row(b)
            for start in range(0, len(prompt), chunk):
                tokens = prompt[start : start + chunk]
                if memory is None or module is None or torch.is_grad_enabled():
                    ids = torch.tensor([tokens], device=model.device)
                    hidden = model.hidden_states(ids, row, last=True)[:, -1]
                else:
                    hidden = _pass_of(module, model, row, len(tokens), memory)(module, model, row, tokens)
                row.lengths += len(tokens)
            last.append(hidden)
    if memory is not None and not memory.worth_keeping:  # the recordings would keep it
        cache.passes.clear()
    return model.head(torch.cat(last))


def _pass_of(module: Any, model: Decoder, row: Any, tokens: int, memory: Scratch) -> _PromptPass:
    """The pass of so many tokens, a new one where the last such pass was not the same in everything but its numbers."""
    passes: dict[Any, _PromptPass] = row.passes
    key = (tokens, row.capacity, row.layers[0].keys.data_ptr())
    # What its calls depend on beside its places: the same objects, small numbers and interned strings among them.
    state = (memory, torch.get_num_threads(), sys.intern(module.active_isa()), forced_backend(), *model.parts)
    found = passes.get(key)
    if found is None or len(found.state) != len(state) or any(a is not b for a, b in zip(found.state, state)):
        if found is not None or len(passes) >= KEPT_PASSES:
            passes.clear()
        found = passes[key] = _PromptPass(tokens, row.capacity, memory, state)
    return found


class _PromptPass:
    """The hidden state after the next ``tokens`` of one sequence. It knows its cache's memory, but neither cache nor model: both
    know it."""

    def __init__(self, tokens: int, capacity: int, memory: Scratch, state: tuple[object, ...]) -> None:
        self.state = state
        self._memory = memory
        self._ids = torch.zeros(1, tokens, dtype=torch.int64)
        self._last = torch.tensor([tokens])
        self._places = Places(torch.zeros_like(self._ids), torch.zeros(1, 1, dtype=torch.int64), capacity)
        self._turn = 0
        self._hidden: Tensor | None = None  # of the recording
        self._replay: Callable[[], None] | None = None
        self._pieces: list[Piece] = []  # of memory, where the recorded calls write

    def __call__(self, module: Any, model: Decoder, row: Any, tokens: Sequence[int]) -> Tensor:
        """(1, hidden), in memory of its own."""
        places = self._places
        module.place_tokens(tokens, row.lengths, self._last, self._ids, places.positions, places.kv_lens)
        self._turn += 1
        if self._turn == 2:
            return self._recorded(module, model, row)
        # A piece that something uses since must not be written to.
        if self._replay is None or self._hidden is None or any(piece.owner() is not None for piece in self._pieces):
            return self._computed(model, row)
        self._replay()
        for piece in self._pieces:
            piece.idle = 0
        return self._hidden.clone()

    def _computed(self, model: Decoder, row: Any) -> Tensor:
        return model.hidden_states(self._ids, row, self._places, last=True)[:, -1]

    def _recorded(self, module: Any, model: Decoder, row: Any) -> Tensor:
        """Computes the pass while the compiled module writes its calls down."""
        recording = module.Recording()
        with self._memory.small_ones_too():
            recording.start(self._memory.holds)
            try:
                hidden = self._computed(model, row)
            finally:
                recording.stop()
        if len(recording) == model.kernel_calls - 1:  # the head is not among them
            self._hidden, self._replay, self._pieces = hidden, recording.replay, self._memory.free_pieces
        return hidden.clone()
