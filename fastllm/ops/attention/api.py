"""The public function: checks, schema, fake, gradient, and which backends serve."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...backends import Backend
from ...errors import dtype_error, shape_error, type_error, value_error
from .. import _check, _op, _triton
from . import cuda, native, reference, values

_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? kv_lens, Tensor? sinks, Tensor? block_table, Tensor? k_scale, "
    "Tensor? v_scale, bool causal, float scale, int? window, float? softcap) -> Tensor"
)


def _prepare(
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
) -> tuple[Any, ...]:
    _check.floating("attention", "q", q)
    quantized = k_scale is not None or v_scale is not None
    narrower = isinstance(k, Tensor) and q.dtype == torch.float32 and k.dtype in (torch.bfloat16, torch.float16)
    dtype, to_match = (torch.int8, "k_scale and v_scale") if quantized else (k.dtype if narrower else q.dtype, "q")
    _check.like("attention", "k", k, dtype, q.device, to_match)
    _check.like("attention", "v", v, dtype, q.device, "k" if narrower else to_match)
    if q.dim() != 4 or q.shape[1] == 0 or q.shape[3] == 0:
        raise shape_error("attention", "q", q.shape, "(B, H, T, D) with H and D of at least 1")
    B, H, _, D = q.shape
    if block_table is not None:
        S = _check_pages(q, k, kv_lens, block_table)
    elif k.dim() != 4 or k.shape[0] != B or k.shape[3] != D:
        raise shape_error("attention", "k", k.shape, f"({B}, Hk, S, {D})", f"to match q {tuple(q.shape)}")
    else:
        S = k.shape[2]
    Hk = k.shape[1]
    if Hk == 0 or H % Hk != 0:
        because = f"because each of its heads serves the same number of the {H} heads of q"
        raise shape_error("attention", "k", k.shape, f"a number of heads that divides {H}", because)
    if v.shape != k.shape:
        raise shape_error("attention", "v", v.shape, f"{tuple(k.shape)}", "to match k")
    if quantized:
        _check_scale("k_scale", k_scale, k)
        _check_scale("v_scale", v_scale, k)
    if not isinstance(causal, bool):
        raise type_error("attention", "causal", causal, "True or False")
    for name, value in (("scale", scale), ("window", window), ("softcap", softcap)):
        if value is not None:
            _check.number("attention", name, value)
    if scale is not None and not math.isfinite(scale):
        raise value_error("attention", "scale", scale, "a finite number, or None for D ** -0.5")
    if window is not None and not window >= 1:
        raise value_error("attention", "window", window, "at least 1 token, or None")
    if softcap is not None and not (softcap > 0.0 and math.isfinite(softcap)):
        raise value_error("attention", "softcap", softcap, "a finite number above 0, or None")
    if mask is not None:
        _check_mask(mask, q, S)
    if kv_lens is not None:
        _check.tensor("attention", "kv_lens", kv_lens)
        if kv_lens.dtype not in (torch.int32, torch.int64):
            raise dtype_error("attention", "kv_lens", kv_lens.dtype, "torch.int32 or torch.int64")
        if kv_lens.shape != (B,):
            raise shape_error("attention", "kv_lens", kv_lens.shape, f"({B},)", "one length a sequence of q")
        _check_device("kv_lens", kv_lens, q)
    if sinks is not None:
        _check.tensor("attention", "sinks", sinks)
        if sinks.dtype not in (torch.float32, q.dtype):
            raise dtype_error("attention", "sinks", sinks.dtype, _either(torch.float32, q.dtype))
        if sinks.shape != (H,):
            raise shape_error("attention", "sinks", sinks.shape, f"({H},)", "one logit a head of q")
        _check_device("sinks", sinks, q)
    scale = D**-0.5 if scale is None else float(scale)
    softcap = None if softcap is None else float(softcap)
    return q, k, v, mask, kv_lens, sinks, block_table, k_scale, v_scale, causal, scale, window, softcap


def _check_scale(name: str, scale: Any, k: Tensor) -> None:
    _check.tensor("attention", name, scale)
    if scale.dtype != torch.float32:
        raise dtype_error("attention", name, scale.dtype, "torch.float32")
    _check_device(name, scale, k)
    if scale.shape != k.shape[:3]:
        raise shape_error("attention", name, scale.shape, f"{tuple(k.shape[:3])}", "one scale a token and head of k")


def _check_pages(q: Tensor, k: Tensor, kv_lens: Any, block_table: Any) -> int:
    """Returns S, the tokens that a row of the table has room for."""
    _check.tensor("attention", "block_table", block_table)
    if block_table.dtype not in (torch.int32, torch.int64):
        raise dtype_error("attention", "block_table", block_table.dtype, "torch.int32 or torch.int64")
    if block_table.dim() != 2 or block_table.shape[0] != q.shape[0]:
        expected = f"({q.shape[0]}, max_pages)"
        raise shape_error("attention", "block_table", block_table.shape, expected, "one row of pages a sequence of q")
    _check_device("block_table", block_table, q)
    if k.dim() != 4 or k.shape[0] == 0 or k.shape[2] == 0 or k.shape[3] != q.shape[3]:
        expected = f"(num_pages, Hk, page, {q.shape[3]}) with num_pages and page of at least 1"
        raise shape_error("attention", "k", k.shape, expected, "because block_table is given")
    if kv_lens is None:
        raise type_error("attention", "kv_lens", kv_lens, "a torch.Tensor", "because block_table is given")
    return int(block_table.shape[1] * k.shape[2])


def _check_mask(mask: Tensor, q: Tensor, S: int) -> None:
    _check.tensor("attention", "mask", mask)
    if mask.dtype not in (torch.bool, torch.float32, q.dtype):
        raise dtype_error("attention", "mask", mask.dtype, "torch.bool, " + _either(torch.float32, q.dtype))
    full = (*q.shape[:3], S)
    if mask.dim() > 4 or any(n not in (1, full[i - 4]) for i, n in enumerate(mask.shape, 4 - mask.dim())):
        raise shape_error("attention", "mask", mask.shape, f"a shape that broadcasts to {full}", "(B, H, T, S)")
    _check_device("mask", mask, q)


def _check_device(arg: str, value: Tensor, q: Tensor) -> None:
    if value.device != q.device:
        raise ValueError(f"attention: {arg} is on {value.device}, expected {q.device} to match q")


def _either(*dtypes: torch.dtype) -> str:
    return " or ".join(dict.fromkeys(map(str, dtypes)))


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
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
    if block_table is not None and block_table.is_cpu:
        values.check_pages(block_table, kv_lens, k)
    o = reference.attention(
        q,
        k,
        v,
        causal,
        scale=scale,
        window=window,
        softcap=softcap,
        mask=mask,
        kv_lens=kv_lens,
        sinks=sinks,
        block_table=block_table,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    return o.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _fake(q: Tensor, *_: object) -> Tensor:
    B, H, T, D = q.shape
    return q.new_empty((B, T, H, D)).transpose(1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.causal, ctx.scale, ctx.window, ctx.softcap = inputs
    ctx.save_for_backward(*tensors)


def _part(mask: Tensor, b: int, group: slice) -> Tensor:
    """One sequence's and one group's part of a mask of 4 dims, as a view."""
    mask = mask if mask.shape[0] == 1 else mask[b : b + 1]
    return mask if mask.shape[1] == 1 else mask[:, group]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Recomputes the weights of one sequence and one key/value head at a time: 4 G T S floats at once.

    With P the weights, z the masked scores and g = dP - sum over keys of dP P: dz = P g; dv = P^T do; dP = do v^T; the sink,
    a key of value 0, has g = -sum over keys of dP P.
    """
    q, k, v, mask, kv_lens, sinks, block_table, k_scale, _v_scale = ctx.saved_tensors
    if block_table is not None or k_scale is not None:
        _refuse_gradient(ctx)
    G = q.shape[1] // k.shape[1]
    grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=torch.float32, device=q.device) for x in (q, k, v))
    mask4 = None if mask is None else mask[(None,) * (4 - mask.dim())]
    grad_mask = None if mask4 is None or not ctx.needs_input_grad[3] else torch.zeros_like(mask4, dtype=torch.float32)
    grad_sinks = torch.zeros_like(sinks, dtype=torch.float32) if sinks is not None else None
    valid_k, valid_v = reference.valid(k, kv_lens), reference.valid(v, kv_lens)
    for b in range(q.shape[0]):
        see = reference.visible(q, k, ctx.causal, ctx.window, None if kv_lens is None else kv_lens[b : b + 1])
        for head in range(k.shape[1]):
            group = slice(head * G, (head + 1) * G)
            query, do = q[b : b + 1, group].float(), grad[b : b + 1, group].float()
            key, value = valid_k[b : b + 1, head : head + 1].float(), valid_v[b : b + 1, head : head + 1].float()
            capped = reference.scores(query, key, ctx.scale, ctx.softcap)
            score = reference.masked(capped, see, None if mask4 is None else _part(mask4, b, group))
            p, p_sink = reference.softmax(score, None if sinks is None else sinks[group])
            grad_v[b, head] = (p.transpose(-1, -2) @ do)[0].sum(0)
            dp = do @ value.transpose(-1, -2)
            mean = (dp * p).sum(-1, keepdim=True)
            dz = p * (dp - mean)
            if grad_mask is not None:
                part = _part(grad_mask, b, group)
                part += dz.sum_to_size(part.shape)
            if grad_sinks is not None and p_sink is not None:
                grad_sinks[group] -= (p_sink * mean).sum((0, 2, 3))
            if ctx.softcap is not None:
                dz = dz * (1 - (capped / ctx.softcap) ** 2)
            grad_q[b, group] = (dz @ key * ctx.scale)[0]
            grad_k[b, head] = (dz.transpose(-1, -2) @ query * ctx.scale)[0].sum(0)
    return (
        grad_q.to(q.dtype),
        grad_k.to(k.dtype),
        grad_v.to(v.dtype),
        None if grad_mask is None else grad_mask.view(mask.shape).to(mask.dtype),
        None,
        None if grad_sinks is None else grad_sinks.to(sinks.dtype),
        None,
        None,
        None,
        None,
        None,
        None,
        None,
    )


_refuse_gradient = _op.refuse_gradient("attention", "a cache in pages or in int8 is read while generating")
_attention = _op.Op(
    "attention",
    _SCHEMA,
    fake=_fake,
    backends=(
        Backend("cpu", native.attention, native.refuse),
        Backend("cuda", cuda.attention, cuda.refuse),
        _triton.backend(__package__, "attention"),
        Backend("reference", _reference, _check.never_refuse),
    ),
    prepare=_prepare,
    backward=(_setup_context, _backward),
)


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
    """Attention of each query over the keys that it sees; two kernels, for prefill and for decode, under one name.

    o[b, h, t] = sum_s P[t, s] v[b, h // G, s],  G = H / Hk
    P = softmax over s of z,  z = cap(scale q[b, h, t] . k[b, h // G, s]) + mask,  cap(x) = softcap tanh(x / softcap)

    The T queries are the last T of the keys' tokens: with L = kv_lens[b] or S, query t stands at position L - T + t.

    Args:
        q: (B, H, T, D) fp32|bf16|fp16; the last dim has stride 1, the others any.
        k: (B, Hk, S, D) of q's dtype, or bf16|fp16 with fp32 q; Hk divides H: query head h reads head h // G.
        v: shape and dtype of k.
        causal: a query sees the keys up to its own position; where L - T + t < 0 it sees none.
        scale: multiplies q . k; None for D ** -0.5.
        window: in tokens: a query sees only keys whose position differs from its own by less than that.
        softcap: bounds the scores to (-softcap, softcap), before masks; in the scores' units.
        mask: broadcasts to (B, H, T, S): boolean (True is visible), or fp32 or q's dtype, added to the scores.
        kv_lens: (B,) int32|int64 from 0 to S: keys from kv_lens[b] on are not there, whatever k and v hold.
        sinks: (H,) fp32 or q's dtype: a logit a head that only adds exp(sink) to the softmax's denominator.
        block_table: (B, max_pages) int32|int64: k and v are then pools (num_pages, Hk, page, D), S is max_pages * page, and
            key s of sequence b is row s % page of page block_table[b, s // page]. It needs kv_lens; entries of pages from
            kv_lens[b] on, and rows of pages that no key is in, may hold anything.
        k_scale, v_scale: (B, Hk, S) fp32, or (num_pages, Hk, page): k and v are then int8, and a value is its integer times
            its token's scale. fastllm.quant.quantize_rows makes them.

    Returns:
        o (B, H, T, D) of q's dtype, a view of a contiguous (B, T, H, D): o.transpose(1, 2).reshape(B, T, H * D) is free.
        A query that sees no key gets zeros.

    Raises:
        TypeError: a dtype, or a non-tensor. ValueError: a shape, a range; on the CPU also a kv_lens outside of 0 to S and a
        page in use that is not in the pool. On CUDA those two are not looked at, for that would wait for the GPU: a length
        is bounded to 0 to S, a wrong page is read from wherever it would be.

    Numerics: scores, weights and sums in fp32, rounded once at the end. Bits do not depend on the number of threads, nor
    on the other sequences of the batch. A NaN in a visible key, value or mask reaches the rows that see it. Gradients to
    q, k, v, mask and sinks, recomputed in fp32 with 4 G T S floats of memory at a time; none with pages or int8. The
    integers of an int8 cache enter the products exactly; the score takes k's scale in fp32, the weight v's before it is
    rounded as ever.
    Cost: bytes of q, k, v and o; 4 D flops for each pair of a query and a key that it sees. No T x S matrix is made, nor a
    dequantised or gathered copy, except by the reference, which serves pages on the CPU.
    Source: Vaswani et al. 2017; Milakov and Gimelshein 2018 (online softmax); Dao et al. 2022 (blocks); reference.py has
    those of the variants and of pages.
    """
    args = _prepare(
        q,
        k,
        v,
        causal,
        scale=scale,
        window=window,
        softcap=softcap,
        mask=mask,
        kv_lens=kv_lens,
        sinks=sinks,
        block_table=block_table,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    return _attention(*args)
