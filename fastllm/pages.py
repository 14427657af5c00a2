"""Memory in pages of 2 MiB, where Linux gives them to who asks: a decode step reads all weights and the cache once, and in pages of
4 KiB it waits for addresses, and starts the hardware's prefetching anew on each page."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["HUGE_PAGE", "HugePages"]

HUGE_PAGE = 2 << 20
LINE = 64  # bytes of a cache line: what every piece is aligned to
BLOCK = 32 * HUGE_PAGE  # of addresses; memory is taken page by page, as it is written to


class HugePages:
    """Hands out CPU memory piece after piece, so that small tensors share pages. A block lives as long as a piece of it does."""

    def __init__(self) -> None:
        self._block: mmap.mmap | None = None
        self._used = self._end = 0

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous CPU tensor (shape) of zeros, of any dtype, 64-byte aligned, with a storage of its own.

        Raises: OSError where the system grants no more memory.
        """
        count = math.prod(shape)
        size = count * dtype.itemsize
        if count == 0:
            return torch.zeros(tuple(shape), dtype=dtype)
        start = -(-self._used // LINE) * LINE
        if self._block is None or start + size > self._end:
            start = self._new_block(size)
        assert self._block is not None
        self._used = start + size
        return torch.frombuffer(self._block, dtype=dtype, count=count, offset=start).view(tuple(shape))

    def _new_block(self, size: int) -> int:
        """Where its first page starts."""
        size = max(BLOCK, -(-size // HUGE_PAGE) * HUGE_PAGE)
        # Private: Linux has a setting of its own for shared memory, by default "never".
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
        self._block = mmap.mmap(-1, size + HUGE_PAGE, **private)
        start = -torch.frombuffer(self._block, dtype=torch.uint8).data_ptr() % HUGE_PAGE
        self._end = start + size
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel that has none
                self._block.madvise(mmap.MADV_HUGEPAGE, start, size)
        return start
