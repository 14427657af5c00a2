"""The preallocated key/value cache."""

from __future__ import annotations

import torch

from ..errors import value_error

__all__ = ["KVCache"]


class KVCache:
    """Keys and values of every layer, written in place, one slot a token.

    Sequence b holds ``lengths[b]`` tokens in slots 0 .. lengths[b] - 1; a token's slot is its position.

    Args:
        keys, values: one (B, Hk, S_max, D) tensor a layer.

    Cost: 2 * num_layers * B * Hk * S_max * D elements.
    """

    def __init__(
        self, num_layers: int, batch: int, num_kv_heads: int, capacity: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        for name, value in (("batch", batch), ("capacity", capacity)):
            if value < 1:
                raise value_error("KVCache", name, value, "at least 1")
        shape = (batch, num_kv_heads, capacity, head_dim)
        # Zeroed, not merely reserved: a slot beyond a sequence's length is masked, but NaN times zero would still be NaN.
        self.keys = [torch.zeros(shape, dtype=dtype) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype) for _ in range(num_layers)]
        self.lengths = torch.zeros(batch, dtype=torch.int64)
        self.capacity = capacity

    @property
    def batch(self) -> int:
        return len(self.lengths)
