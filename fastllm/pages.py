"""Memory in pages of 2 MiB, where Linux gives them to who asks: a decode step reads all weights and the cache once, and in pages of
4 KiB it waits for addresses, and starts the hardware's prefetching anew on each page. And memory
for what comes and goes, whose pages the system need not clear each time."""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref
from bisect import insort
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["HUGE_PAGE", "HugePages", "Piece", "Scratch"]

HUGE_PAGE = 2 << 20
LINE = 64  # bytes of a cache line: what every piece is aligned to
BLOCK = 32 * HUGE_PAGE  # of addresses; memory is taken page by page, as it is written to
LEAST_PIECE = 1 << 20  # bytes: what the heap would give back to the system
IDLE_PASSES = 8  # after so many without use a piece is given back
KEPT_SCRATCH = 128 << 20  # bytes, at most, of scratch memory that waits for the next pass


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
        self._block, start = _mapped(size)
        self._end = start + size
        return start


class Scratch:
    """Memory for tensors that come and go, the same ones again and again: a pass's activations. A piece that no tensor uses any more
    is the next one's, in pages that have been cleared already; by itself the heap gives large pieces back to the system, and gets
    new ones for it to clear. One thread's at a time."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []  # the smallest first
        self._least = LEAST_PIECE

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous CPU tensor (shape) of undefined contents, 64-byte aligned, with a storage of its own. Small ones are the
        heap's, which is faster."""
        count = math.prod(shape)
        size = count * dtype.itemsize
        if size < self._least:
            return torch.empty(tuple(shape), dtype=dtype)
        # Not one that is much too large: whoever needs that would have to take another.
        piece = next((p for p in self._pieces if size <= p.size <= 2 * size and p.owner() is None), None)
        if piece is None:
            # Where all start at the same place of a page, reads and writes of several in step hinder each other.
            piece = Piece(size, len(self._pieces) % 7 * 9 * LINE)
            insort(self._pieces, piece, key=lambda p: p.size)
        piece.idle = 0
        return piece.tensor(shape, dtype, count)

    @contextlib.contextmanager
    def small_ones_too(self) -> Iterator[None]:
        """In this context all but the smallest tensors are pieces: what is recorded would keep the heap's alive, layer by layer."""
        self._least = mmap.PAGESIZE
        try:
            yield
        finally:
            self._least = LEAST_PIECE

    def holds(self, address: int) -> bool:
        """Whether a piece has this address."""
        return any(piece.address <= address < piece.address + piece.size for piece in self._pieces)

    @property
    def free_pieces(self) -> list[Piece]:
        """Those that no tensor uses."""
        return [piece for piece in self._pieces if piece.owner() is None]

    @property
    def nbytes(self) -> int:
        return sum(piece.size for piece in self._pieces)

    @property
    def worth_keeping(self) -> bool:
        return self.nbytes <= KEPT_SCRATCH

    def end_pass(self) -> None:
        """Gives back the pieces that no pass has used for some time: a shorter prompt between long ones does not need all."""
        self._pieces = [piece for piece in self._pieces if piece.idle < IDLE_PASSES]
        for piece in self._pieces:
            piece.idle += 1


class Piece:
    """A mapping of its own, and who has it."""

    def __init__(self, size: int, offset: int) -> None:
        self.size = size
        self._memory, self._start = _mapped(size + offset)
        self._start += offset
        self.address = torch.frombuffer(self._memory, dtype=torch.uint8, offset=self._start).data_ptr()
        self.owner: Callable[[], object] = lambda: None  # what the last tensor's storage keeps alive
        self.idle = 0  # passes since it was used

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, count: int) -> Tensor:
        owner = memoryview(self._memory)
        self.owner = weakref.ref(owner)
        return torch.frombuffer(owner, dtype=dtype, count=count, offset=self._start).view(tuple(shape))


def _mapped(size: int) -> tuple[mmap.mmap, int]:
    """New memory of at least ``size`` zeroed bytes, and where they start: at a huge page if they fill one."""
    # Private: Linux has a setting of its own for shared memory, by default "never".
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    if size < HUGE_PAGE:
        return mmap.mmap(-1, size, **private), 0
    block = mmap.mmap(-1, size + HUGE_PAGE, **private)
    start = -torch.frombuffer(block, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel that has none
            block.madvise(mmap.MADV_HUGEPAGE, start, size // HUGE_PAGE * HUGE_PAGE)
    return block, start
