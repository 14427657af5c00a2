"""Device functions that several ops' Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_start(row, n1, n2, s0, s1, s2):
    """Where row r of ``_triton.Rows`` starts, in elements."""
    row = row.to(tl.int64)  # a tensor may have more than 2^31 elements
    return row // n2 // n1 * s0 + row // n2 % n1 * s1 + row % n2 * s2
