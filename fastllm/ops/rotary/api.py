"""The public functions: checks, schemas, fakes, gradients, and which backends serve."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import Backend
from .. import _check, _op, _triton
from . import cuda, native, reference

# ---------------------------------------------------------------- checks


def _heads(op: str, arg: str, x: Any) -> None:
    _check.floating(op, arg, x)
    if x.dim() != 4:
        raise _check.shape_error(op, arg, x.shape, "4 dims (B, H, T, D)")


def _keys(op: str, arg: str, x: Any, q: Tensor) -> None:
    _check.like(op, arg, x, q.dtype, q.device, "q")
    B, _, T, D = q.shape
    if x.dim() != 4 or (x.shape[0], x.shape[2], x.shape[3]) != (B, T, D):
        raise _check.shape_error(op, arg, x.shape, f"({B}, Hk, {T}, {D})", f"to match q {tuple(q.shape)}")


def _angles(op: str, cos: Any, sin: Any, q: Tensor, table: bool) -> None:
    _check.floating(op, "cos", cos)
    if cos.dtype not in (torch.float32, q.dtype):
        either = "torch.float32" if q.dtype == torch.float32 else f"torch.float32 or {q.dtype}"
        raise _check.dtype_error(op, "cos", cos.dtype, either, "to match q")
    if cos.device != q.device:
        raise ValueError(f"{op}: cos is on {cos.device}, expected {q.device} to match q")
    _check.like(op, "sin", sin, cos.dtype, cos.device, "cos")
    if sin.shape != cos.shape:
        raise _check.shape_error(op, "sin", sin.shape, f"{tuple(cos.shape)}", "to match cos")
    B, _, T, D = q.shape
    per_token = cos.dim() == 3 and cos.shape[0] in (1, B) and cos.shape[1] == T
    if not per_token and not (table and cos.dim() == 2):
        expected = f"({B} or 1, {T}, rotary_dim)" + (" or (max_positions, rotary_dim)" if table else "")
        raise _check.shape_error(op, "cos", cos.shape, expected, f"to match q {tuple(q.shape)}")
    if cos.shape[-1] > D or cos.shape[-1] % 2 or cos.shape[-1] == 0:
        because = f"even and at most D = {D}, to match q {tuple(q.shape)}"
        raise _check.shape_error(op, "cos", cos.shape, "a last dim rotary_dim", because)


def _cache(op: str, arg: str, cache: Any, k: Tensor, quantized: bool, paged: bool) -> None:
    if quantized:
        _check.tensor(op, arg, cache)
        if cache.dtype != torch.int8:
            raise _check.dtype_error(op, arg, cache.dtype, "torch.int8", "because k_scale and v_scale are given")
    else:
        _check.floating(op, arg, cache)
    if not quantized and k.dtype not in (cache.dtype, torch.float32):
        raise _check.dtype_error(op, arg, cache.dtype, str(k.dtype), "to match k")
    if cache.device != k.device:
        raise ValueError(f"{op}: {arg} is on {cache.device}, expected {k.device} to match k")
    B, Hk, _, D = k.shape
    if cache.dim() != 4 or (cache.shape[1], cache.shape[3]) != (Hk, D) or not (paged or cache.shape[0] == B):
        expected = f"(num_pages, {Hk}, page, {D})" if paged else f"({B}, {Hk}, max_tokens, {D})"
        raise _check.shape_error(op, arg, cache.shape, expected, f"to match k {tuple(k.shape)}")
    if paged and 0 in (cache.shape[0], cache.shape[2]):
        raise _check.shape_error(op, arg, cache.shape, "num_pages and page of at least 1", "because block_table is given")


def _table(op: str, table: Any, q: Tensor) -> None:
    _check.tensor(op, "block_table", table)
    if table.dtype not in (torch.int32, torch.int64):
        raise _check.dtype_error(op, "block_table", table.dtype, "torch.int32 or torch.int64")
    if table.dim() != 2 or table.shape[0] != q.shape[0]:
        raise _check.shape_error(
            op, "block_table", table.shape, f"({q.shape[0]}, max_pages)", "one row of pages a sequence of q"
        )
    if table.device != q.device:
        raise ValueError(f"{op}: block_table is on {table.device}, expected {q.device} to match q")


def _scale(op: str, arg: str, scale: Any, cache: Tensor) -> None:
    _check.like(op, arg, scale, torch.float32, cache.device, "an int8 cache")
    if scale.shape != cache.shape[:3]:
        raise _check.shape_error(op, arg, scale.shape, f"{tuple(cache.shape[:3])}", "one scale a token and head of the cache")


def _indices(op: str, arg: str, index: Any, q: Tensor) -> None:
    _check.tensor(op, arg, index)
    if index.dtype != torch.int64:
        raise _check.dtype_error(op, arg, index.dtype, "torch.int64")
    if index.device != q.device:
        raise ValueError(f"{op}: {arg} is on {index.device}, expected {q.device} to match q")
    B, _, T, _ = q.shape
    if not (index.shape == (T,) or (index.dim() == 2 and index.shape[0] in (1, B) and index.shape[1] == T)):
        raise _check.shape_error(op, arg, index.shape, f"({T},), (1, {T}) or ({B}, {T})", f"to match q {tuple(q.shape)}")


def _prepare(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Any, ...]:
    _heads("apply_rotary", "q", q)
    _keys("apply_rotary", "k", k, q)
    _angles("apply_rotary", cos, sin, q, table=False)
    return q, k, cos, sin, bool(interleaved)


def _prepare_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    *,
    slots: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    block_table: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Any, ...]:
    op = "apply_rotary_cache"
    _heads(op, "q", q)
    _keys(op, "k", k, q)
    _check.like(op, "v", v, k.dtype, k.device, "k")
    if v.shape != k.shape:
        raise _check.shape_error(op, "v", v.shape, f"{tuple(k.shape)}", "to match k")
    _angles(op, cos, sin, q, table=True)
    quantized = k_scale is not None or v_scale is not None
    if block_table is not None:
        _table(op, block_table, q)
    _cache(op, "k_cache", k_cache, k, quantized, block_table is not None)
    _check.like(op, "v_cache", v_cache, k_cache.dtype, k_cache.device, "k_cache")
    if v_cache.shape != k_cache.shape:
        raise _check.shape_error(op, "v_cache", v_cache.shape, f"{tuple(k_cache.shape)}", "to match k_cache")
    if quantized:
        _scale(op, "k_scale", k_scale, k_cache)
        _scale(op, "v_scale", v_scale, v_cache)
    _indices(op, "positions", positions, q)
    if slots is not None:
        _indices(op, "slots", slots, q)
    return q, k, v, cos, sin, k_cache, v_cache, positions, slots, k_scale, v_scale, block_table, bool(interleaved)


# ---------------------------------------------------------------- fakes, the reference as a backend


def _laid_out_like(y: Tensor, x: Tensor) -> Tensor:
    """y with the strides that native.empty_like(x) has (where a size is above 1): the same ones from every backend."""
    # A clone: contiguous() may keep what strides a dim of size 1 has.
    if x.stride(1) < x.stride(2):
        return y.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    return y.clone(memory_format=torch.contiguous_format)


def _fake_like(x: Tensor) -> Tensor:
    B, H, T, D = x.shape
    return x.new_empty((B, T, H, D)).transpose(1, 2) if x.stride(1) < x.stride(2) else x.new_empty(x.shape)


def _fake(q: Tensor, k: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _fake_like(q), _fake_like(k)


def _fake_cache(q: Tensor, *_: object) -> Tensor:
    return _fake_like(q)


def _reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    turned = reference.apply_rotary(q, k, cos, sin, interleaved=interleaved)
    return _laid_out_like(turned[0], q), _laid_out_like(turned[1], k)


def _reference_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    slots: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor | None,
    interleaved: bool,
) -> Tensor:
    y = reference.apply_rotary_cache(
        q,
        k,
        v,
        cos,
        sin,
        k_cache,
        v_cache,
        positions,
        slots=slots,
        k_scale=k_scale,
        v_scale=v_scale,
        block_table=block_table,
        interleaved=interleaved,
    )
    return _laid_out_like(y, q)


# ---------------------------------------------------------------- gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, cos, sin, ctx.interleaved = inputs
    angles = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    ctx.save_for_backward(cos, sin, *((q, k) if angles else ()))


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    """y = x cos + rotate(x) sin, and rotate's transpose is -rotate: d/dx = g cos - rotate(g sin).

    d/dcos = the sum of g x over the heads, d/dsin = the sum of g rotate(x).
    """
    cos, sin, *inputs = ctx.saved_tensors
    wide_cos, wide_sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    R = cos.shape[-1]

    def to_input(g: Tensor) -> Tensor:
        turned = g[..., :R].float()
        turned = turned * wide_cos - reference.rotate(turned * wide_sin, ctx.interleaved)
        return torch.cat((turned.to(g.dtype), g[..., R:]), -1)

    grad_cos = grad_sin = None
    if inputs:
        # q's and k's heads side by side: cos and sin serve them all.
        x = torch.cat([t[..., :R].float() for t in inputs], 1)
        g = torch.cat([t[..., :R].float() for t in (grad_q, grad_k)], 1)
        grad_cos = (x * g).sum(1).sum_to_size(cos.shape).to(cos.dtype)
        grad_sin = (reference.rotate(x, ctx.interleaved) * g).sum(1).sum_to_size(sin.shape).to(sin.dtype)
    return to_input(grad_q), to_input(grad_k), grad_cos, grad_sin, None


# ---------------------------------------------------------------- ops

_rotary = _op.Op(
    "apply_rotary",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)",
    fake=_fake,
    backends=(
        Backend("cpu", native.apply_rotary, native.refuse),
        Backend("cuda", cuda.apply_rotary, cuda.refuse),
        _triton.backend(__package__, "apply_rotary"),
        Backend("reference", _reference, _check.never_refuse),
    ),
    prepare=_prepare,
    backward=(_setup_context, _backward),
)
_rotary_cache = _op.Op(
    "apply_rotary_cache",
    "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions, "
    "Tensor? slots, Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor? block_table, bool interleaved) -> Tensor",
    fake=_fake_cache,
    backends=(
        Backend("cpu", native.apply_rotary_cache, native.refuse_cache),
        Backend("cuda", cuda.apply_rotary_cache, cuda.refuse_cache),
        _triton.backend(__package__, "apply_rotary_cache"),
        Backend("reference", _reference_cache, _check.never_refuse),
    ),
    prepare=_prepare_cache,
    no_gradient="it overwrites the caches; apply_rotary has one",
)


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Rotary position embedding: each pair of lanes of each head turns by its token's angle.

    (a, b) -> (a cos - b sin, b cos + a sin), the pair being lanes (i, i + R/2), or (2i, 2i + 1) if interleaved

    Args:
        q: (B, H, T, D) fp32|bf16|fp16; any strides with the lanes of a head together.
        k: (B, Hk, T, D) of q's dtype.
        cos: (B or 1, T, R) fp32 or of q's dtype, R <= D even; lanes R to D - 1 pass through (partial rotary). A value for
            each lane, as transformers gives them: cat(angles, angles) for pairs (i, i + R/2) of LLaMA and GPT-NeoX,
            repeat_interleave(angles, 2) for the interleaved pairs of GPT-J.
        sin: as cos.
        interleaved: which lanes pair up.

    Returns:
        (q, k) turned: new, dense tensors, in (B, T, H, D) memory order where the argument is, else in (B, H, T, D).

    Raises:
        TypeError: a dtype. ValueError: a shape.

    Numerics: fp32 arithmetic, rounded once (transformers rounds cos, sin, both products and their sum to q's dtype).
    The bits do not depend on the batch or on the number of threads. Gradients to q, k, cos and sin.
    Cost: 2 (H + Hk) T D elements moved for each sequence; 3 flops an element.
    Source: Su et al. 2021, arXiv:2104.09864. Angles in radians enter through cos and sin: see fastllm.nn.rope_tables.
    """
    return _rotary(*_prepare(q, k, cos, sin, interleaved=interleaved))


def apply_rotary_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    *,
    slots: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    block_table: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Rotary position embedding of q and k, and the write of k and v into the key/value cache, in one pass.

    k_cache[b, :, slots[b, t]] = turned k[b, :, t];  v_cache[b, :, slots[b, t]] = v[b, :, t]

    All that changes from one decode step to the next is read from tensors, so that a captured step can be replayed.

    Args:
        q: (B, H, T, D) fp32|bf16|fp16.
        k, v: (B, Hk, T, D) of q's dtype.
        cos, sin: (max_positions, R) fp32 or of q's dtype: tables whose row p holds position p; or (B or 1, T, R): a row
            for each token, as in apply_rotary.
        k_cache, v_cache: (B, Hk, max_tokens, D) of k's dtype, or bf16|fp16 with fp32 k, or int8 with k_scale and v_scale;
            written to at the slots only.
        positions: (T,), (1, T) or (B, T) int64: positions in tokens, the rows of the tables.
        slots: the same shapes, int64: the rows of the caches, where padding makes them differ from the positions.
            Default: positions. Two tokens of one sequence must not share a slot: which one stays is not defined.
        k_scale, v_scale: (B, Hk, max_tokens) fp32, of int8 caches: a row's largest magnitude / 127, written at the same slots.
        block_table: (B, max_pages) int32|int64: the caches (and scales) are then pools (num_pages, Hk, page, D), and slot s of
            sequence b is row s % page of page block_table[b, s // page], as ``fastllm.attention`` reads them. Slots go up to
            max_pages * page - 1; no two sequences' slots may share a row.
        interleaved: which lanes pair up, as in apply_rotary.

    Returns:
        q turned, as from apply_rotary.

    Raises:
        TypeError: a dtype. ValueError: a shape, or a position or slot outside of its table or cache; nothing has been
        written then; so with a page that is not in the pool. On CUDA these are not looked at, for that would wait for the GPU: a
        position outside of its table turns its token into NaN, a slot or page that is not there is not written.
        NotImplementedError: an argument requires a gradient; apply_rotary has one.

    Numerics: as apply_rotary; v's bits are copied where dtypes agree, else rounded once. Into an int8 cache k goes from fp32,
    ties to even (fastllm.quant.quantize_rows); a row that holds an infinity or a NaN gets the scale NaN.
    Cost: 2 (H + 2 Hk) T D elements moved for each sequence.
    """
    args = _prepare_cache(
        q,
        k,
        v,
        cos,
        sin,
        k_cache,
        v_cache,
        positions,
        slots=slots,
        k_scale=k_scale,
        v_scale=v_scale,
        block_table=block_table,
        interleaved=interleaved,
    )
    return _rotary_cache(*args)
