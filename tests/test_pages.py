"""Memory in huge pages."""

from __future__ import annotations

import gc
import re
import weakref
from pathlib import Path

import pytest
import torch

from fastllm.pages import BLOCK, HUGE_PAGE, HugePages


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
