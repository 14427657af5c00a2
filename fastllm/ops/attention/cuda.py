"""attention in CUDA C++: chooses between decode and prefill, allocates the output and scratch, calls fastllm._cuda."""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

from ...backends import cuda_module, forced_backend
from .. import _op
from .._launch import gpu_of
from . import values

_cuda: Any = cuda_module()

HEAD_DIMS = (64, 80, 96, 128, 256)
# Up to this many rows (query tokens times query heads that share a key/value head) the decode kernel serves: it splits the keys
# over blocks and reads them once for 16 rows, where prefill has a block for each head and 128 tokens.
DECODE_ROWS = 64
MAX_TOKENS = 1 << 29  # of q and of k each: positions and windows are 32-bit integers
MAX_GRID = 65535  # of a grid's second and third dim
LOG2E = math.log2(math.e)


def _decodes(T: int, G: int) -> bool:
    """One token always: prefill would read k and v once for each query head."""
    return T * G <= DECODE_ROWS or T == 1


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def by_warpgroups(q: Tensor, k: Tensor, block_table: Tensor | None, k_scale: Tensor | None) -> bool:
    """Whether it is prefill that has a kernel with sm_90's matrix instructions, csrc/cuda/attention_prefill_sm90.cu."""
    prefill = not _decodes(q.shape[2], q.shape[1] // k.shape[1])
    return prefill and q.shape[3] in (64, 128) and block_table is None and k_scale is None


def _lacks_warpgroups(q: Tensor, k: Tensor, block_table: Tensor | None, k_scale: Tensor | None) -> bool:
    """Whether the GPU has matrix instructions of warp groups, and prefill of this call uses none."""
    gpu = gpu_of(q.device)
    compiled = any(name.startswith("90a") for name in _cuda.architectures.split())
    served = (gpu.major, gpu.minor) == (9, 0) and compiled and by_warpgroups(q, k, block_table, k_scale)
    return gpu.major in (9, 10) and not served


def _tokens(k: Tensor, block_table: Tensor | None) -> int:
    return k.shape[2] if block_table is None else k.shape[2] * block_table.shape[1]


def refuse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    kv_lens: Tensor | None,
    sinks: Tensor | None,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    *_: object,
) -> str | None:
    reason = _op.refuse_unless_cuda(q, k, v)
    if reason is not None:
        return reason
    B, H, T, D = q.shape
    if q.dtype == torch.float32:
        return "its products are of 16-bit floats"
    if D not in HEAD_DIMS:
        return f"it is compiled for head dims of {', '.join(map(str, HEAD_DIMS))}, not {D}"
    if mask is not None:
        return "it takes no mask but causal, window and kv_lens"
    if why := _op.refuse_unless_vectors("heads", q=q, k=k, v=v):
        return why
    if max(T, _tokens(k, block_table)) > MAX_TOKENS or max(B, T // 64) > MAX_GRID:
        return f"it counts up to {MAX_TOKENS} tokens and {MAX_GRID} sequences"
    if not _decodes(T, H // k.shape[1]):
        if k_scale is not None:
            return f"it reads int8 keys for up to {DECODE_ROWS} rows, a query token and head each, of a key/value head"
        if q.is_cuda and forced_backend() != "cuda" and _lacks_warpgroups(q, k, block_table, k_scale) and _has_triton():
            return "its prefill lacks the matrix instructions of warp groups, which Triton's has on this GPU"
    return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: None,
    kv_lens: Tensor | None,
    sinks: Tensor | None,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    B, H, T, D = q.shape
    Hk, S = k.shape[1], _tokens(k, block_table)
    if block_table is not None and q.is_cpu:
        values.check_pages(block_table, kv_lens, k)
    # (B, T, H, D) in memory: the model's reshape to (B, T, H * D) is then free.
    o = _op.empty((B, T, H, D), dtype=q.dtype, device=q.device).transpose(1, 2)
    if not o.numel():
        return o
    if window is not None and window >= S + T:  # wider than any distance
        window = None
    # Where scores may stay q . k until the exp2, nothing is rounded before the difference is taken. The exponent must be
    # above 0: the largest score is to have the largest one.
    scaled = softcap is None and scale * LOG2E < torch.finfo(torch.float32).tiny
    if softcap is not None:
        factor, exponent = 2.0 * LOG2E * scale / softcap, LOG2E
    else:
        factor, exponent = (scale, LOG2E) if scaled else (1.0, scale * LOG2E)
    parts, split_keys = None, 0
    if _decodes(T, H // Hk):
        split_keys = _cuda.attention_split_keys(S, Hk, q.device.index or 0)
        splits = max(1, -(-S // split_keys))
        parts = _op.empty((B * H * T * splits * (D + 2),), dtype=torch.float32, device=q.device)
    _cuda.attention(
        q, k, v, kv_lens, sinks, block_table, k_scale, v_scale, o, parts, causal,
        math.ceil(window or 0), scaled, softcap is not None, factor, softcap or 0.0, exponent, split_keys,
    )  # fmt: skip
    return o
