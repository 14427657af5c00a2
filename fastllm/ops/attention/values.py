"""What only the numbers in a tensor tell: looked at on the CPU, where it costs nobody a synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import value_error


def check_pages(block_table: Tensor, kv_lens: Tensor | None, k: Tensor) -> None:
    """Every length fits the table, and every entry that a length uses is a page of k; the others may hold anything."""
    assert kv_lens is not None  # api.py asks for it
    num_pages, page = k.shape[0], k.shape[2]
    S = page * block_table.shape[1]
    for b, length in enumerate(kv_lens.tolist()):
        if not 0 <= length <= S:
            because = f"because block_table has {block_table.shape[1]} pages of {page} tokens a sequence"
            raise value_error("attention", f"kv_lens[{b}]", length, f"0 to {S}", because)
    used = torch.arange(block_table.shape[1]) * page < kv_lens[:, None]
    for b, i in (used & ((block_table < 0) | (block_table >= num_pages))).nonzero().tolist():
        because = f"because k has {num_pages} pages"
        raise value_error("attention", f"block_table[{b}, {i}]", int(block_table[b, i]), f"0 to {num_pages - 1}", because)
