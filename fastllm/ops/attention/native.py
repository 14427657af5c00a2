"""attention on the CPU: allocates the output, chooses one of the two kernels, calls fastllm._cpu."""

from __future__ import annotations

from typing import Any

from torch import Tensor, get_num_threads

from ...backends import cpu_module
from .. import _op

_cpu: Any = cpu_module()

# Up to this many rows (query tokens times query heads that share a key/value head) the decode kernel serves: it reads K
# and V once and splits them over threads. Above, the prefill kernel's tiles are faster.
DECODE_ROWS = 16


def refuse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    kv_lens: Any,
    sinks: Any,
    block_table: Any,
    k_scale: Any,
    v_scale: Any,
    *_: object,
) -> str | None:
    reason = _op.refuse_unless_cpu(q, k, v, mask, kv_lens, sinks)
    if reason is None:
        if block_table is not None:
            return "it reads keys and values that lie in one piece a head, not in pages"
        for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
            if x is not None and x.stride(-1) != 1 and x.shape[-1] > 1:
                return f"it reads scales whose last dim has stride 1; {name} has stride {x.stride(-1)}"
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.stride(-1) != 1 and x.shape[-1] != 1 and x.numel():
                return f"it reads heads whose last dim has stride 1; {name} has stride {x.stride(-1)}"
    return reason


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    kv_lens: Tensor | None,
    sinks: Tensor | None,
    block_table: None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    B, H, T, D = q.shape
    # (B, T, H, D) in memory: the model's reshape to (B, T, H * D) is then free.
    o = _op.empty((B, T, H, D), dtype=q.dtype).transpose(1, 2)
    if mask is not None and mask.dim() < 4:
        mask = mask[(None,) * (4 - mask.dim())]
    if sinks is not None:
        sinks = sinks.float().contiguous()  # H numbers
    kernel = _cpu.attention_decode if T * (H // k.shape[1]) <= DECODE_ROWS else _cpu.attention_prefill
    kernel(q, k, v, mask, kv_lens, sinks, k_scale, v_scale, o, causal, scale, window or 0, softcap or 0.0, get_num_threads())
    return o
