"""Memory in huge pages, and memory that is used again."""

from __future__ import annotations

import gc
import re
import threading
import weakref
from pathlib import Path

import pytest
import torch

from fastllm.ops import _op
from fastllm.pages import BLOCK, HUGE_PAGE, IDLE_PASSES, LEAST_PIECE, HugePages, Scratch


def test_pieces_are_zero_aligned_apart_and_have_storages_of_their_own():
    memory = HugePages()
    shapes = [(3,), (16, 5), (1, 1), (0, 4), (HUGE_PAGE + 1,), (7, 9)]
    pieces = [memory.zeros(shape, dtype) for shape in shapes for dtype in (torch.uint8, torch.float16, torch.float32)]
    assert all(piece.shape in shapes and not piece.any() and piece.is_contiguous() for piece in pieces)
    pieces = [piece for piece in pieces if piece.numel()]
    assert all(piece.data_ptr() % 64 == 0 for piece in pieces)
    for i, piece in enumerate(pieces):
        assert piece.untyped_storage().data_ptr() == piece.data_ptr()
        piece.fill_(i + 1)
    assert all(bool((piece == i + 1).all()) for i, piece in enumerate(pieces))


def test_what_does_not_fit_gets_a_block_of_its_own():
    memory = HugePages()
    small, large = memory.zeros((64,), torch.uint8), memory.zeros((BLOCK + 1,), torch.uint8)
    large[-1] = 1
    assert small.data_ptr() % HUGE_PAGE == large.data_ptr() % HUGE_PAGE == 0
    behind = memory.zeros((64,), torch.uint8)  # the rest of the large one's last page
    assert behind.data_ptr() == large.data_ptr() + BLOCK + 64


def test_a_block_lives_as_long_as_a_piece():
    memory = HugePages()
    piece = memory.zeros((1000,), torch.float32)
    block = weakref.ref(memory._block)
    del memory
    gc.collect()
    piece.fill_(2.0)
    assert block() is not None and float(piece.sum()) == 2000
    del piece
    gc.collect()
    assert block() is None


def test_linux_gives_huge_pages_where_it_gives_them_to_who_asks():
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists() or "[never]" in enabled.read_text():
        pytest.skip("this system has no transparent huge pages")
    piece = HugePages().zeros((4 * HUGE_PAGE,), torch.uint8)
    piece.fill_(1)
    at, huge = piece.data_ptr(), 0
    for mapping in re.split(r"^(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text(), flags=re.M)[1:]:
        start, end = (int(x, 16) for x in mapping.split(None, 1)[0].split("-"))
        if start <= at < end:
            assert "hg" in re.search(r"^VmFlags:.*", mapping, re.M).group().split()  # asked for
            huge = int(re.search(r"^AnonHugePages: *(\d+)", mapping, re.M).group(1))
    if not huge:
        pytest.skip("the system had none left")


def test_a_piece_is_the_next_tensors_when_nothing_uses_it_any_more():
    memory = Scratch()
    n = LEAST_PIECE // 4
    x = memory.empty((2, n), torch.float32)
    assert (x.shape, x.dtype, x.is_contiguous(), x.data_ptr() % 64) == ((2, n), torch.float32, True, 0)
    assert memory.holds(x.data_ptr())
    assert not memory.holds(x.data_ptr() - 1)
    assert not memory.holds(torch.zeros(n).data_ptr())
    where, view = x.data_ptr(), x[1:, 5:].t()
    del x
    y = memory.empty((2 * n,), torch.float32)
    assert y.data_ptr() != where  # the view is in use
    assert not memory.free_pieces
    del view
    assert memory.empty((n + 1,), torch.int32).data_ptr() == where  # of another type, and smaller
    assert memory.empty((n, 2), torch.float32).data_ptr() == where
    small = memory.empty((n - 1,), torch.float32)
    assert not memory.holds(small.data_ptr())  # the heap's
    with memory.small_ones_too():
        assert memory.empty((n - 1,), torch.float32).data_ptr() != where  # which is more than twice as large
        assert memory.holds(memory.empty((n - 1,), torch.float32).data_ptr())
    assert not memory.holds(memory.empty((n - 1,), torch.float32).data_ptr())
    assert memory.empty((3, 0), torch.float32).shape == (3, 0)


def test_pieces_that_no_pass_uses_are_given_back():
    memory = Scratch()
    size = 2 * LEAST_PIECE
    memory.empty((4 * size,), torch.uint8)
    held = memory.empty((size,), torch.uint8)
    for _ in range(IDLE_PASSES):
        memory.empty((size,), torch.uint8)
        assert memory.nbytes == 6 * size
        memory.end_pass()
    memory.empty((size,), torch.uint8)
    memory.end_pass()
    assert memory.nbytes == size
    held.fill_(3)
    for _ in range(IDLE_PASSES + 1):
        memory.end_pass()
    assert memory.nbytes == 0
    assert bool((held == 3).all())  # its memory lives as long as it does


def test_ops_have_their_outputs_in_a_threads_scratch_memory():
    memory, elsewhere = Scratch(), []
    shape = (LEAST_PIECE // 4,)
    with _op.outputs_in(memory):
        assert memory.holds(_op.empty(shape, dtype=torch.float32).data_ptr())
        thread = threading.Thread(target=lambda: elsewhere.append(_op.empty(shape, dtype=torch.float32)))
        thread.start()
        thread.join()
        with _op.outputs_in(Scratch()):
            assert not memory.holds(_op.empty(shape, dtype=torch.float32).data_ptr())
        assert memory.holds(_op.empty(shape, dtype=torch.float32).data_ptr())
    assert not memory.holds(elsewhere[0].data_ptr())
    assert not memory.holds(_op.empty(shape, dtype=torch.float32).data_ptr())
    assert _op.empty((), dtype=torch.int64).shape == ()
