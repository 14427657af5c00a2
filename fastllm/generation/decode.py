"""The decode step, recorded once and replayed: one call from Python instead of hundreds.

A step of a given batch makes the same kernel calls on the same memory every time; ids, positions and lengths are read from
tensors. So one step is written down, and the later ones only put the new numbers into those tensors and repeat the calls. On a
CPU the compiled module writes its own calls down; what PyTorch itself computes is not written down, so that a step that needs it
(float matrices, the reference backend) shows in the number of calls, and then runs from Python each time. On a GPU CUDA captures
whatever is launched, PyTorch's kernels too; a step that waits for the GPU in between can't be captured, and runs from Python.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..backends import cpu_module
from ..nn.cache import Places
from ..pages import Scratch

__all__ = ["DecodeStep", "Decoder", "borrowed_cache"]


class Decoder(Protocol):
    """What generation needs of a model."""

    @property
    def kernel_calls(self) -> int:
        """How many kernels hidden_states and head launch together if the compiled module serves every op."""

    @property
    def prefill_tokens(self) -> int:
        """Tokens of a prompt that are to go through hidden_states at once."""

    @property
    def device(self) -> torch.device: ...
    def query_runs(self, tokens: int) -> int: ...
    def new_cache(self, batch: int, capacity: int) -> Any: ...
    def give_back(self, cache: Any) -> None: ...
    def scratch(self) -> contextlib.AbstractContextManager[Scratch | None]: ...
    @property
    def parts(self) -> tuple[object, ...]: ...
    def hidden_states(self, ids: Tensor, cache: Any, places: Places | None = None, *, last: bool = False) -> Tensor: ...
    def head(self, hidden: Tensor) -> Tensor: ...


@contextlib.contextmanager
def borrowed_cache(model: Decoder, batch: int, capacity: int) -> Iterator[Any]:
    """A new cache of the model's, given back at the end."""
    cache = model.new_cache(batch, capacity)
    try:
        yield cache
    finally:
        model.give_back(cache)


class DecodeStep:
    """The next T tokens of each sequence of a cache: ``step(ids)`` -> logits (B T, V) after each, overwritten by the next step.

    Args:
        model: the forward pass.
        cache: its ``lengths`` say where the tokens go; the caller advances them.
        tokens: T, whose ids come sequence by sequence. On the CPU, where all matrices are quantised, a token's logits have the bits that
            T steps of one token would give it, and do not depend on the other sequences: ``quant_matmul`` promises it, and attention
            takes the queries in ``query_runs``.
    """

    def __init__(self, model: Decoder, cache: Any, tokens: int = 1) -> None:
        self._model, self._cache = model, cache
        batch = len(cache.lengths)
        self._ids = torch.zeros(batch, tokens, dtype=torch.int64, device=model.device)
        runs = model.query_runs(tokens)
        self._last = torch.arange(1, runs + 1) * (tokens // runs)  # of each run, counted from 1
        # Attention looks at the whole cache and reads from kv_lens where it ends.
        self._places = Places(torch.zeros_like(self._ids), torch.zeros_like(self._ids[:, :runs]), cache.capacity)
        self._logits: Tensor | None = None
        self._replay: Callable[[], Any] | None = None
        self._timed_replay: Callable[[], list[tuple[str, float]]] | None = None  # of a recording alone
        self._module: Any = cpu_module() if model.device.type == "cpu" else None
        # By name: a bound method would be a circle, and a step and its cache are large to wait for the collector.
        self._how = {"cpu": "_record_calls", "cuda": "_warm_up"}.get(model.device.type, "_compute")

    @torch.inference_mode()
    def __call__(self, ids: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        flat: list[int] = []
        for tokens in ids:
            flat += [tokens] if isinstance(tokens, int) else tokens
        places, lengths = self._places, self._cache.lengths
        assert places.kv_lens is not None
        if self._module is not None:
            self._module.place_tokens(flat, lengths, self._last, self._ids, places.positions, places.kv_lens)
        else:
            self._ids.copy_(torch.tensor(flat).view(self._ids.shape))
            places.positions.copy_(lengths[:, None] + torch.arange(self._ids.shape[1]))
            places.kv_lens.copy_(lengths[:, None] + self._last)
        if self._replay is not None:
            self._replay()
            assert self._logits is not None
            return self._logits
        self._logits = getattr(self, self._how)()
        return self._logits

    def timed(self, ids: Sequence[int] | Sequence[Sequence[int]]) -> tuple[Tensor, list[tuple[str, float]]]:
        """A replayed step that tells each call's kernel and its seconds, in order. Raises RuntimeError where steps are not replayed
        from a recording: before the second step, on a GPU, where PyTorch has a part in them."""
        if self._timed_replay is None:
            raise RuntimeError("decode: this step has no recording to time, expected a second step of kernels alone")
        calls: list[tuple[str, float]] = []
        timed, replay = self._timed_replay, self._replay
        self._replay = lambda: calls.extend(timed())
        try:
            return self(ids), calls
        finally:
            self._replay = replay

    def _compute(self) -> Tensor:
        return self._model.head(self._model.hidden_states(self._ids, self._cache, self._places).flatten(0, 1))

    def _record_calls(self) -> Tensor:
        """Computes the step while the compiled module writes its calls down."""
        self._how = "_compute"
        if self._module is None:
            return self._compute()
        recording = self._module.Recording()
        recording.start()
        try:
            logits = self._compute()
        finally:
            recording.stop()
        if len(recording) == self._model.kernel_calls:
            self._replay, self._timed_replay = recording.replay, recording.timed_replay
        return logits

    def _warm_up(self) -> Tensor:
        """The first step compiles and loads kernels, which a capture could not hold; the next one is captured."""
        self._how = "_capture"
        return self._compute()

    def _capture(self) -> Tensor:
        """Captures the step, which computes nothing yet, and replays it."""
        self._how = "_compute"
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                logits = self._compute()
        except RuntimeError:  # something waited for the GPU: the reference backend reads lengths
            torch.cuda.synchronize()
            return self._compute()
        graph.replay()
        self._replay = graph.replay
        return logits
