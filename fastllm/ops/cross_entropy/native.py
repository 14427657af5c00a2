"""cross_entropy on the CPU: a stretch of the vocabulary at a time, its product first, then fastllm._cpu's reduction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, get_num_threads

from ...backends import cpu_module
from .. import _op
from ..quant_matmul import native as quant_matmul
from . import reference

_cpu: Any = cpu_module()

ROWS = 512  # of hidden at a time: enough for a product to reach its speed
TILE = 1 << 20  # logits at a time: 4 MiB, which L2 and L3 hold until they have been reduced
WIDENED = 1 << 22  # elements of a 16-bit weight that are fp32 at a time: 16 MiB
SEGMENT = 1024  # of the kernel: stretches are whole segments, so that a row's bits do not depend on how long they are


def refuse(
    hidden: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    minimum: Tensor | None,
    target: Tensor,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    zero: int,
    layout: str,
    *_: object,
) -> str | None:
    reason = _op.refuse_unless_cpu(hidden, weight, scale, minimum, target)
    if reason is None and scale is not None and layout != "x16":
        return f"it reads weights in layout 'x16', not '{layout}'; pack() them"
    return reason


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    minimum: Tensor | None,
    target: Tensor,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    zero: int,
    layout: str,
    int8_activations: bool,
    softcap: float,
    ignore_index: int,
) -> Tensor:
    reference.check_target(target, n, ignore_index)
    loss = _op.empty(target.shape, dtype=torch.float32)
    M, threads = target.numel(), get_num_threads()
    if M == 0:
        return loss
    # In fp32, so that logits are not rounded: the products compute in it anyway.
    rows, targets, losses = hidden.reshape(-1, k).float().contiguous(), target.reshape(-1).contiguous(), loss.view(-1)
    state = _op.empty((M, 3), dtype=torch.float64)
    columns = TILE // min(M, ROWS)
    if weight.dtype in (torch.bfloat16, torch.float16):
        columns = min(columns, WIDENED // k)
    columns = max(columns // SEGMENT, 1) * SEGMENT
    tile = None if scale is not None else _op.empty((min(M, ROWS) * min(columns, n),), dtype=torch.float32)
    for first in range(0, n, columns):
        last = min(first + columns, n)
        if tile is not None:
            stretch = weight[first:last].float().T
        for start in range(0, M, ROWS):
            part = slice(start, min(start + ROWS, M))
            x = rows[part]
            if tile is not None:
                # out=, because autocast would make anything else 16 bits
                logits = torch.mm(x, stretch, out=tile[: len(x) * (last - first)].view(len(x), -1))
            else:
                logits = _quantized(x, weight, scale, minimum, first, last, k, bits, group_size, zero, int8_activations)
            final = losses[part] if last == n else None
            _cpu.cross_entropy(logits, targets[part], state[part], final, first, softcap, ignore_index, threads)
    return loss


def _quantized(
    x: Tensor,
    data: Tensor,
    scale: Any,
    minimum: Tensor | None,
    first: int,
    last: int,
    k: int,
    bits: int,
    group_size: int,
    zero: int,
    int8_activations: bool,
) -> Tensor:
    """Logits of the rows [first, last) of a weight in layout "x16", whose blocks hold 16 rows; first is a multiple of that."""
    blocks = slice(first // 16, (last + 15) // 16)
    minimum = None if minimum is None else minimum[blocks]
    return quant_matmul.quant_matmul(
        x, data[blocks], scale[blocks], minimum, None, last - first, k, bits, group_size, zero, "x16", int8_activations
    )
