"""The preallocated key/value cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import value_error
from ..pages import HUGE_PAGE, HugePages

__all__ = ["CachedLayer", "KVCache", "Places"]


@dataclass(frozen=True)
class Places:
    """Where the next tokens stand.

    Args:
        positions: (B, T) int64, the position and the cache slot of each token.
        kv_lens: (B,) int64, tokens of each sequence once these have joined; None if they are all ``keys``. Or (B, R): attention takes
            the T tokens in R runs of T / R queries each, and this is how many tokens there are at the end of each run.
        keys: how many slots attention has to look at.
    """

    positions: Tensor
    kv_lens: Tensor | None
    keys: int


class CachedLayer(NamedTuple):
    """One layer's keys and values, (B, Hk, S, D); and of int8 ones their scales, (B, Hk, S) fp32."""

    keys: Tensor
    values: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None

    def map(self, view: Callable[[Tensor], Tensor]) -> CachedLayer:
        """The same view of each."""
        return CachedLayer(*(None if t is None else view(t) for t in self))  # type: ignore[arg-type]

    def row(self, b: int) -> CachedLayer:
        """Sequence b by itself."""
        return self.map(lambda t: t[b : b + 1])


class KVCache:
    """Keys and values of every layer, written in place, one slot a token.

    Sequence b holds ``lengths[b]`` tokens in slots 0 .. lengths[b] - 1; a token's slot is its position.

    Args:
        dtype: fp32|bf16|fp16, or int8, which keeps a scale for each token and head too.
        device: where ``layers`` are. ``lengths`` stays on the CPU: Python plans with it, and must not wait for a GPU to do so.

    Cost: 2 * num_layers * B * Hk * S_max * D elements; int8 adds 4 bytes for each D of them.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("batch", batch), ("capacity", capacity)):
            if value < 1:
                raise value_error("KVCache", name, value, "at least 1")
        shape = (batch, num_kv_heads, capacity, head_dim)

        large = 2 * num_layers * math.prod(shape) * dtype.itemsize >= 2 * HUGE_PAGE
        memory = HugePages() if large and torch.device(device).type == "cpu" else None

        def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return memory.zeros(shape, dtype) if memory else torch.zeros(shape, dtype=dtype, device=device)

        # Zeroed, not merely reserved: a slot beyond a sequence's length is masked, but NaN times zero would still be NaN.
        def layer() -> CachedLayer:
            keys, values = (zeros(shape, dtype) for _ in range(2))
            scales = (zeros(shape[:3], torch.float32) if dtype == torch.int8 else None for _ in range(2))
            return CachedLayer(keys, values, *scales)

        self.layers = [layer() for _ in range(num_layers)]
        self.lengths = torch.zeros(batch, dtype=torch.int64)
        self.capacity = capacity
        self.whole: KVCache | None = None  # whose memory this uses a part of
        self.passes: dict[Any, Any] = {}  # what has been recorded of prompts in this memory (fastllm.generation.prefill)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].keys.dtype

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for layer in self.layers for t in layer if t is not None)

    def emptied(self, capacity: int) -> KVCache:
        """An empty cache of this or a lower capacity, in this one's memory."""
        empty = copy(self)
        empty.layers = [layer.map(lambda t: t[:, :, :capacity].zero_()) for layer in self.layers]
        empty.lengths = torch.zeros_like(self.lengths)
        empty.capacity = capacity
        empty.whole = self
        return empty

    def row(self, b: int) -> KVCache:
        """Sequence b by itself: a view, whose lengths (1,) are this cache's too."""
        one = copy(self)
        one.layers = [layer.row(b) for layer in self.layers]
        one.lengths = self.lengths[b : b + 1]
        return one

    def places(self, tokens: int) -> Places:
        """Where ``tokens`` more tokens of each sequence stand."""
        kv_lens, device = self.lengths + tokens, self.layers[0].keys.device
        positions = (self.lengths[:, None] + torch.arange(tokens)).to(device)
        return Places(positions, kv_lens.to(device) if self.batch > 1 else None, int(kv_lens.max()))
