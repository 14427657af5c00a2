"""The two functions that transformers' attention registry knows as "fastllm": the mask and the attention.

transformers makes one mask a pass and hands it to every layer as it is, so it may take a form that our kernels like better than
T x S booleans. Every form has four dims, because transformers passes four-dimensional masks on unchanged.

==========================  ===========================================================================================
the mask                    what it says
==========================  ===========================================================================================
None                        causal, aligned to the end of the keys; the layer's sliding window, if it has one, on top
int64 (B, 1, 1, 1)          only so many keys are in use (a preallocated cache); causal and window, aligned to their end
uint8 (B, 1, 1, E)          the first E keys are in use, those with 0 are padding; causal and window, aligned to E's end
bool or float (.., T, S)    all that there is to say, as ``scaled_dot_product_attention`` takes it: causal and window too
==========================  ===========================================================================================

A sliding window is not in the first three: layers that have one pass it to the attention function, as they do for flash attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_tracing

from ..ops import attention
from ..ops._check import FLOATS

NAME = "fastllm"
MASK_ARGUMENTS = ["batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask"]


def unknown() -> str | None:
    """Why the functions below would not understand this transformers, or None."""
    found = list(inspect.signature(sdpa_mask).parameters)
    if found[: len(MASK_ARGUMENTS)] != MASK_ARGUMENTS:
        return f"transformers {transformers.__version__} describes masks by {', '.join(found)}, which fastllm does not know"
    return None


def register() -> None:
    """Make ``attn_implementation="fastllm"`` known. No model changes by that: each names its implementation in its config."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, attention_mask)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """The mask of one pass, in the smallest form that says it (table above). Arguments as transformers' ``sdpa_mask`` has them:
    ``attention_mask`` (B, tokens so far) is False at padding, the first key is token ``kv_offset``, the first query ``q_offset``.
    """

    def whole() -> Tensor | None:
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]  # a tensor where the cache counts in one
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=False,
            device=device,
            **others,
        )

    # Nothing but a causal mask, perhaps with a window, may be skipped; one without a window is known by its function too, which
    # matters for a preallocated cache: transformers never allows the skip while it decodes with one.
    if not (allow_is_causal_skip or mask_function is causal_mask_function):
        return whole()
    seen = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length]
    readable = not any(is_tracing(t) for t in (seen, q_offset) if isinstance(t, Tensor))
    if isinstance(q_offset, Tensor) and readable and allow_is_causal_skip:
        q_offset = int(q_offset)
    end = q_offset + q_length - kv_offset  # keys in use
    if seen is not None and readable and bool(seen.all()) and bool(seen.shape[-1] >= end):
        seen = None
    if seen is None:
        if not isinstance(end, Tensor) and end == kv_length:
            return None
        in_use = torch.zeros((batch_size, 1, 1, 1), dtype=torch.int64, device=device)
        return in_use + end
    if isinstance(end, Tensor) or not allow_is_causal_skip:
        return whole()  # the caller may be compiling: only shapes that stay the same from step to step
    seen = seen[:, :end]
    if (missing := end - seen.shape[-1]) > 0:
        seen = nn.functional.pad(seen, (0, missing))
    return seen.contiguous().view(torch.uint8)[:, None, None, :]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """``fastllm.attention`` for one layer: query (B, H, T, D), key and value (B, Hk, S, D) -> (B, T, H, D).

    Where gradients (PyTorch's backward is fused) or dropout are wanted, or dtypes differ (autocast), PyTorch's own attention
    serves, with the same mask.
    """
    if others.get("output_attentions"):
        raise NotImplementedError(
            "attention: output_attentions is True, expected False, because the fused kernel never forms the weights; "
            "call model.set_attn_implementation('eager') to see them and ('fastllm') to go on"
        )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    wants_gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    same = query.dtype == key.dtype == value.dtype and query.dtype in FLOATS
    unknown = others.get("cache") is not None or others.get("position_bias") is not None
    if wants_gradient or dropout or not same or unknown:
        if s_aux is not None:
            raise NotImplementedError(
                "attention: s_aux is given together with a gradient, dropout, mixed dtypes or a paged cache, expected none of them, "
                "because PyTorch's attention, which serves those, knows no sinks; call model.set_attn_implementation('eager')"
            )
        mask = _whole_mask(attention_mask, query.shape[2], key.shape[2], causal, sliding_window, query.device)
        others |= {"dropout": dropout, "scaling": scaling, "is_causal": causal, "softcap": softcap}
        return sdpa_attention_forward(module, query, key, value, mask, **others)
    mask, kv_lens, window = None, None, sliding_window if causal else None
    if attention_mask is not None:
        if attention_mask.dtype == torch.uint8:
            in_use = attention_mask.shape[-1]
            key, value = key[:, :, :in_use], value[:, :, :in_use]
            mask = attention_mask.view(torch.bool)
        elif attention_mask.dtype == torch.int64:
            kv_lens = attention_mask.flatten()
        else:
            mask, causal, window = attention_mask, False, None
    out = attention(
        query, key, value, causal=causal, scale=scaling, window=window, softcap=softcap, mask=mask, kv_lens=kv_lens, sinks=s_aux
    )
    return out.transpose(1, 2).contiguous(), None


def _whole_mask(mask: Tensor | None, T: int, S: int, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """Any form of the mask as ``sdpa_attention_forward`` takes it: None, or all of it in (.., T, S)."""
    if not causal or (mask is not None and mask.dtype not in (torch.uint8, torch.int64)):
        return mask
    if mask is None and (T in (1, S)) and (window is None or window >= S):
        return None
    if mask is None:
        end: int | Tensor = S
    else:
        end = mask if mask.dtype == torch.int64 else mask.shape[-1]
    keys = torch.arange(S, device=device)
    queries = torch.arange(T, device=device)[:, None] + (end - T)
    allowed = keys <= queries
    if window is not None:
        allowed = allowed & (keys > queries - window)
    if mask is not None and mask.dtype == torch.uint8:
        allowed = allowed & nn.functional.pad(mask, (0, S - mask.shape[-1])).view(torch.bool)
    return allowed.expand(-1 if allowed.dim() == 4 else 1, 1, T, S)
