"""embedding on the CPU: allocates the output, calls fastllm._cpu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, get_num_threads

from ...backends import cpu_module
from .. import _op

_cpu: Any = cpu_module()


def refuse(ids: Tensor, data: Tensor, scale: Tensor, minimum: Tensor | None, *form: Any) -> str | None:
    reason = _op.refuse_unless_cpu(ids, data, scale, minimum)
    if reason is None and (layout := form[5]) != "x16":
        return f"it reads tables in layout 'x16', not '{layout}'; pack() them"
    return reason


def embedding(
    ids: Tensor,
    data: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    zero: int,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    y = _op.empty((*ids.shape, k), dtype=dtype)
    _cpu.embedding(ids.to(torch.int64).contiguous(), data, scale, minimum, y, n, k, bits, group_size, zero, get_num_threads())
    return y
