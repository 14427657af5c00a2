"""The decode step, recorded once and replayed: one call from Python instead of hundreds.

A step of a given batch makes the same kernel calls on the same memory every time; ids, positions and lengths are read from
tensors. So the first step runs with the compiled module writing its calls down, and the later ones only put the new numbers
into those tensors and repeat the calls. What PyTorch itself computes is not written down: a step that needs it (float matrices,
the reference backend) shows in the number of calls, and then runs from Python each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..backends import cpu_module
from ..nn.cache import Places

__all__ = ["DecodeStep", "Decoder"]


class Decoder(Protocol):
    """What generation needs of a model."""

    @property
    def kernel_calls(self) -> int:
        """How many kernels hidden_states and head launch together if the compiled module serves every op."""

    def new_cache(self, batch: int, capacity: int) -> Any: ...
    def hidden_states(self, ids: Tensor, cache: Any, places: Places | None = None) -> Tensor: ...
    def head(self, hidden: Tensor) -> Tensor: ...


class DecodeStep:
    """One token for each sequence of a cache: ``step(ids)`` -> logits (B, V), overwritten by the next step.

    Args:
        model: the forward pass.
        cache: its ``lengths`` say where the tokens go; the caller advances them.
    """

    def __init__(self, model: Decoder, cache: Any) -> None:
        self._model, self._cache = model, cache
        batch = len(cache.lengths)
        self._ids = torch.zeros(batch, 1, dtype=torch.int64)
        # Attention looks at the whole cache and reads from kv_lens where it ends.
        self._places = Places(torch.zeros_like(self._ids), torch.zeros(batch, dtype=torch.int64), cache.capacity)
        self._logits: Tensor | None = None
        self._recording: Any = None
        self._recordable = cpu_module() is not None

    @torch.inference_mode()
    def __call__(self, ids: Sequence[int]) -> Tensor:
        assert self._places.kv_lens is not None
        self._ids.copy_(torch.tensor(ids)[:, None])
        self._places.positions.copy_(self._cache.lengths[:, None])
        torch.add(self._cache.lengths, 1, out=self._places.kv_lens)
        if self._recording is not None:
            self._recording.replay()
            assert self._logits is not None
            return self._logits
        self._logits = self._record() if self._recordable else self._compute()
        return self._logits

    def _compute(self) -> Tensor:
        return self._model.head(self._model.hidden_states(self._ids, self._cache, self._places)[:, -1])

    def _record(self) -> Tensor:
        recording: Any = cpu_module().Recording()  # type: ignore[union-attr]
        recording.start()
        try:
            logits = self._compute()
        finally:
            recording.stop()
        self._recordable = len(recording) == self._model.kernel_calls
        if self._recordable:
            self._recording = recording
        return logits
