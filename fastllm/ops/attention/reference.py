"""Attention in plain PyTorch (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762), with the variants of LLaMA-family models.

Grouped key/value heads: Ainslie et al. 2023, arXiv:2305.13245. Sliding window: Jiang et al. 2023, arXiv:2310.06825.
Softcap: Gemma 2, arXiv:2408.00118. Sinks: GPT-OSS, arXiv:2508.10925. Pages: Kwon et al. 2023 (vLLM), arXiv:2309.06180.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    kv_lens: Tensor | None = None,
    sinks: Tensor | None = None,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    k, v = whole(k, k_scale, block_table, kv_lens), whole(v, v_scale, block_table, kv_lens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    see = visible(q, k, causal, window, kv_lens)
    k, v = valid(k, kv_lens), valid(v, kv_lens)
    G = q.shape[1] // k.shape[1]
    outputs = []
    for head in range(k.shape[1]):  # one at a time, because all heads' T x S matrices at once need gigabytes
        group = slice(head * G, (head + 1) * G)
        score = scores(q[:, group], k[:, head : head + 1], scale, softcap)
        score = masked(score, see, mask if mask is None or mask.dim() < 3 or mask.shape[-3] == 1 else mask[..., group, :, :])
        p, _ = softmax(score, None if sinks is None else sinks[group])
        outputs.append((p @ wide(v[:, head : head + 1])).to(q.dtype))
    return torch.cat(outputs, 1)


def whole(x: Tensor, scale: Tensor | None, block_table: Tensor | None, kv_lens: Tensor | None) -> Tensor:
    """k or v as (B, Hk, S, D): int8 multiplied by its scale, and pages (num_pages, Hk, page, D) put in their order."""
    if scale is not None:
        x = x.to(scale.dtype) * scale[..., None]
    if block_table is None or kv_lens is None:
        return x
    page = x.shape[2]
    used = torch.arange(block_table.shape[1], device=x.device) * page < kv_lens[:, None]
    return x[block_table.masked_fill(~used, 0)].transpose(1, 2).flatten(2, 3)


def wide(x: Tensor) -> Tensor:
    """Half precision computes in fp32, as the kernels do."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def visible(q: Tensor, k: Tensor, causal: bool, window: int | None, kv_lens: Tensor | None) -> Tensor:
    """(B or 1, 1, T, S): whether a query sees a key before any mask. The queries are the last T tokens of the keys."""
    T, S = q.shape[2], k.shape[2]
    keys = torch.arange(S, device=q.device)
    length = torch.tensor([S], device=q.device) if kv_lens is None else kv_lens
    length = length.view(-1, 1, 1, 1)
    position = length - T + torch.arange(T, device=q.device).view(T, 1)
    see = (keys < length).expand(-1, -1, T, -1)
    if causal:
        see = see & (keys <= position)
    if window is not None:
        see = see & ((position - keys).abs() < window)
    return see


def valid(x: Tensor, kv_lens: Tensor | None) -> Tensor:
    """k or v with zeros from kv_lens on, where a cache may hold anything."""
    if kv_lens is None:
        return x
    beyond = torch.arange(x.shape[2], device=x.device) >= kv_lens.view(-1, 1)
    return x.masked_fill(beyond[:, None, :, None], 0.0)


def scores(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    score = wide(q) @ wide(k).transpose(-1, -2) * scale
    return score if softcap is None else softcap * torch.tanh(score / softcap)


def masked(score: Tensor, see: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and mask.dtype == torch.bool:
        see = see & mask
    elif mask is not None:
        score = score + mask
    return score.masked_fill(~see, -math.inf)


def softmax(score: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weights of the keys and of the sink; all zeros where no key is visible."""
    if score.shape[-1] == 0:
        return score, None
    top = score.amax(-1, keepdim=True)
    sink = None if sinks is None else sinks.to(score.dtype).view(-1, 1, 1)
    if sink is not None:
        top = torch.maximum(top, sink)
    top = top.masked_fill(top == -math.inf, 0.0)
    p = torch.exp(score - top)
    total = p.sum(-1, keepdim=True)
    p_sink = None
    if sink is not None:
        p_sink = torch.exp(sink - top)
        total = total + p_sink
    total = total.masked_fill(total == 0.0, 1.0)
    return p / total, None if p_sink is None else p_sink / total
