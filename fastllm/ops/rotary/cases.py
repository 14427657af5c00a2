"""Shapes, inputs and PyTorch's own way, for tests, verify and bench."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Generator, Tensor

from ...quant import quantize_rows
from .._case import Case, OpCases
from . import reference
from .api import apply_rotary, apply_rotary_cache


def _torch_rotate(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def torch_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """transformers' apply_rotary_pos_emb (Phi's for partial rotary, GPT-J's for interleaved pairs), op for op."""
    R = cos.shape[-1]
    cos, sin = cos.to(q.dtype).unsqueeze(1), sin.to(q.dtype).unsqueeze(1)

    def turn(x: Tensor) -> Tensor:
        if x.shape[-1] == R:
            return (x * cos) + (_torch_rotate(x, interleaved) * sin)
        turned, rest = x[..., :R], x[..., R:]
        return torch.cat(((turned * cos) + (_torch_rotate(turned, interleaved) * sin), rest), dim=-1)

    return turn(q), turn(k)


def torch_rotary_cache(
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
    """transformers' apply_rotary_pos_emb, and its static cache's index_copy_ for each sequence; int8 as PyTorch rounds it."""
    positions = torch.atleast_2d(positions)
    slots = torch.atleast_2d(positions if slots is None else slots).expand(q.shape[0], -1)
    if cos.dim() == 2:
        cos, sin = cos[positions], sin[positions]
    q, k = torch_rotary(q, k, cos, sin, interleaved=interleaved)
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if scale is not None:
            steps = x.float().abs().amax(-1) / 127
            x = (x.float() / steps[..., None]).round()
        if block_table is not None:
            for b, t in product(range(q.shape[0]), range(q.shape[2])):
                page, row = block_table[b, slots[b, t] // cache.shape[2]], slots[b, t] % cache.shape[2]
                cache[page, :, row] = x[b, :, t].to(cache.dtype)
                if scale is not None:
                    scale[page, :, row] = steps[b, :, t]
            continue
        for b in range(q.shape[0]):
            cache[b].index_copy_(1, slots[b], x[b].to(cache.dtype))
            if scale is not None:
                scale[b].index_copy_(1, slots[b], steps[b])
    return q


# ---------------------------------------------------------------- inputs


def _angles(positions: Tensor, R: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    angles = positions[..., None].double() * 10000.0 ** (-torch.arange(0, R, 2, dtype=torch.float64) / R)
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def _heads(g: Generator, B: int, H: int, T: int, D: int, dtype: torch.dtype, layout: str) -> Tensor:
    """(B, H, T, D): "model" is a view of (B, T, H, D), "fused" one of a wider buffer, "plain" is contiguous."""
    if layout == "plain":
        return torch.randn(B, H, T, D, generator=g).to(dtype)
    wide = H if layout == "model" else H + 2
    return torch.randn(B, T, wide, D, generator=g).to(dtype)[:, :, :H].transpose(1, 2)


def _inputs(
    B: int,
    H: int,
    Hk: int,
    T: int,
    D: int,
    *,
    dtype: torch.dtype,
    R: int = 0,
    interleaved: bool = False,
    layout: str = "model",
    angles: torch.dtype = torch.float32,
    own_positions: bool = False,
    scale: float = 1.0,
    any_angles: bool = False,
) -> Callable[[Generator], dict[str, Any]]:
    def make(g: Generator) -> dict[str, Any]:
        positions = torch.randint(0, 8192, (B if own_positions else 1, T), generator=g)
        cos, sin = _angles(positions, R or D, interleaved)
        if any_angles:  # the two lanes of a pair need not share a value
            cos, sin = torch.rand(cos.shape, generator=g), torch.rand(sin.shape, generator=g)
        q = _heads(g, B, H, T, D, dtype, layout)
        q[..., ::7] *= scale
        return {
            "q": q,
            "k": _heads(g, B, Hk, T, D, dtype, layout),
            "cos": cos.to(angles),
            "sin": sin.to(angles),
            "interleaved": interleaved,
        }

    return make


def _inputs_cache(
    B: int,
    H: int,
    Hk: int,
    T: int,
    D: int,
    *,
    dtype: torch.dtype,
    max_tokens: int,
    first: int = 0,
    padding: bool = False,
    table: bool = True,
    cache: torch.dtype | None = None,
    page: int = 0,
    **options: Any,
) -> Callable[[Generator], dict[str, Any]]:
    def make(g: Generator) -> dict[str, Any]:
        kwargs = _inputs(B, H, Hk, T, D, dtype=dtype, **options)(g)
        positions = torch.arange(first, first + T)
        if padding:  # sequence b is padded by b tokens on the left: positions lag behind slots
            kwargs["slots"] = positions
            positions = (positions - torch.arange(B)[:, None]).clamp(min=0)
        if table:
            cos, sin = _angles(torch.arange(max_tokens), kwargs["cos"].shape[-1], kwargs["interleaved"])
            kwargs["cos"], kwargs["sin"] = cos.to(kwargs["cos"].dtype), sin.to(kwargs["cos"].dtype)
        kwargs["v"] = _heads(g, B, Hk, T, D, dtype, "model")
        if page:  # of each sequence's pages, shuffled, and two of nobody's
            pages = -(-max_tokens // page)
            kwargs["block_table"] = torch.randperm(B * pages + 2, generator=g)[: B * pages].view(B, pages).int()
        for name in "kv":
            shape = (B * pages + 2, Hk, page, D) if page else (B, Hk, max_tokens, D)
            kept = torch.randn(shape, generator=g)
            if cache == torch.int8:
                kwargs[f"{name}_cache"], kwargs[f"{name}_scale"] = quantize_rows(kept)
            else:
                kwargs[f"{name}_cache"] = kept.to(cache or dtype)
        kwargs["positions"] = positions
        return kwargs

    return make


# ---------------------------------------------------------------- cases


def _cases() -> list[Case]:
    cases = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):

        def add(
            name: str, *shape: int, bench: bool = False, gpu: bool = False, _dtype: torch.dtype = dtype, **options: Any
        ) -> None:
            B, H, Hk, T, D = shape
            R = options.get("R", D)
            moved = 2 * B * (H + Hk) * T * D * _dtype.itemsize + 2 * T * R * options.get("angles", torch.float32).itemsize
            make = _inputs(*shape, dtype=_dtype, **options)
            cases.append(Case(name, _dtype, make, moved, 3 * B * (H + Hk) * T * R, bench, gpu))

        if dtype == torch.bfloat16:
            add("llama-3.1-8b prefill q 4x32x4096x128 k 4x8x4096x128", 4, 32, 8, 4096, 128, bench=True, gpu=True)
        # cos and sin in q's dtype, as transformers has them
        add("llama-3.2-1b prefill q 1x32x512x64 k 1x8x512x64", 1, 32, 8, 512, 64, bench=True, angles=dtype)
        add("llama-3.2-1b decode q 1x32x1x64 k 1x8x1x64", 1, 32, 8, 1, 64, bench=True)
        add("smollm2-135m prefill q 1x9x512x64 k 1x3x512x64", 1, 9, 3, 512, 64, bench=True)
        add("contiguous 2x3x5x32", 2, 3, 1, 5, 32, layout="plain", own_positions=True)
        add("contiguous q 1x8x300x64", 1, 8, 2, 300, 64, layout="plain")
        add("fused qkv 2x4x33x128", 2, 4, 2, 33, 128, layout="fused")
        add("own positions 3x4x7x64", 3, 4, 4, 7, 64, own_positions=True)
        add("cos in q's dtype 1x4x9x64", 1, 4, 2, 9, 64, angles=dtype)
        add("interleaved 2x4x9x64", 2, 4, 2, 9, 64, interleaved=True)
        add("interleaved odd 1x3x5x22", 1, 3, 1, 5, 22, interleaved=True, layout="plain")
        add("partial 32 of 80 2x4x9x80", 2, 4, 2, 9, 80, R=32)
        add("partial interleaved 10 of 24 1x2x5x24", 1, 2, 1, 5, 24, R=10, interleaved=True)
        add("odd half 1x2x3x46", 1, 2, 1, 3, 46)
        add("one pair 1x2x3x2", 1, 2, 1, 3, 2)
        add("any cos and sin 1x2x5x48", 1, 2, 1, 5, 48, any_angles=True)
        add("any cos and sin interleaved 1x2x5x48", 1, 2, 1, 5, 48, any_angles=True, interleaved=True)
        add("outliers 1x4x9x64", 1, 4, 2, 9, 64, scale=1000.0)
        add("no tokens 1x4x0x64", 1, 4, 2, 0, 64)
        add("no heads of k 1x4x3x64", 1, 4, 0, 3, 64)
    return cases


def _cases_cache() -> list[Case]:
    cases = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):

        def add(name: str, *shape: int, bench: bool = False, _dtype: torch.dtype = dtype, **options: Any) -> None:
            B, H, Hk, T, D = shape
            R = options.get("R", D)
            written = D + 4 if options.get("cache") == torch.int8 else D * (options.get("cache") or _dtype).itemsize
            moved = B * T * ((2 * H + 2 * Hk) * D * _dtype.itemsize + 2 * Hk * written) + 2 * T * R * 4
            make = _inputs_cache(*shape, dtype=_dtype, **options)
            cases.append(Case(name, _dtype, make, moved, 3 * B * (H + Hk) * T * R, bench))

        add("llama-3.2-1b decode q 1x32x1x64 of 1024", 1, 32, 8, 1, 64, max_tokens=1024, first=700, bench=True)
        add("llama-3.2-1b prefill q 1x32x512x64 of 1024", 1, 32, 8, 512, 64, max_tokens=1024, bench=True)
        add("smollm2-135m decode q 1x9x1x64 of 512", 1, 9, 3, 1, 64, max_tokens=512, first=17)
        add("padding 3x4x5x32", 3, 4, 2, 5, 32, max_tokens=16, first=3, padding=True)
        add("padding, a step 4x4x1x32", 4, 4, 2, 1, 32, max_tokens=16, first=9, padding=True)
        add("cos a token 2x4x5x32", 2, 4, 2, 5, 32, max_tokens=9, first=2, table=False, own_positions=True)
        add("interleaved partial 2x4x5x40", 2, 4, 2, 5, 40, max_tokens=9, R=24, interleaved=True)
        add("cos in q's dtype 2x4x5x32", 2, 4, 2, 5, 32, max_tokens=9, angles=dtype, layout="fused")
        add("no tokens 1x4x0x64", 1, 4, 2, 0, 64, max_tokens=9)
        int8: dict[str, Any] = {"max_tokens": 16, "cache": torch.int8}
        add("llama-3.2-1b decode, int8 cache", 1, 32, 8, 1, 64, max_tokens=1024, first=700, cache=torch.int8, bench=True)
        add("int8 cache, padding 3x4x5x32", 3, 4, 2, 5, 32, first=3, padding=True, **int8)
        add("int8 cache, partial, outliers 2x4x5x46", 2, 4, 3, 5, 46, R=30, layout="fused", scale=1000.0, **int8)
        add("int8 cache, interleaved 2x4x5x40", 2, 4, 2, 5, 40, interleaved=True, table=False, **int8)
        add("pages 3x4x5x32", 3, 4, 2, 5, 32, max_tokens=16, first=3, padding=True, page=4)
        add("pages, a step, interleaved 2x4x1x64", 2, 4, 2, 1, 64, max_tokens=20, first=9, page=8, interleaved=True)
        add("pages, int8 2x4x5x40", 2, 4, 2, 5, 40, first=2, page=5, **int8)
        if dtype == torch.float32:
            add("bf16 cache 2x4x5x46", 2, 4, 2, 5, 46, max_tokens=9, cache=torch.bfloat16, R=30)
            add("fp16 cache 2x4x5x46", 2, 4, 2, 5, 46, max_tokens=9, cache=torch.float16, R=30, interleaved=True)
    return cases


# ---------------------------------------------------------------- mutants


def _sign_flipped(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Any:
    return reference.apply_rotary(q, k, cos, -sin, **options)


def _halves_swapped(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Any:
    R = cos.shape[-1]

    def swapped(x: Tensor) -> Tensor:
        return torch.cat((x[..., R // 2 : R], x[..., : R // 2], x[..., R:]), -1)

    return reference.apply_rotary(swapped(q), swapped(k), cos, sin, **options)


def _next_position(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Any:
    return reference.apply_rotary(q, k, cos.roll(1, 1), sin.roll(1, 1), **options)


def _other_pairs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Any:
    return reference.apply_rotary(q, k, cos, sin, interleaved=not interleaved)


def _all_lanes(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Any:
    D = q.shape[-1]
    return reference.apply_rotary(q, k, torch.cat([cos] * D, -1)[..., :D], torch.cat([sin] * D, -1)[..., :D], **options)


def _k_untouched(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Any:
    return reference.apply_rotary(q, k, cos, sin, **options)[0], k


def _first_sequence(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Any:
    return reference.apply_rotary(q, k, cos[:1], sin[:1], **options)


def _one_cos_a_pair(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Any:
    half = cos.shape[-1] // 2
    cos, sin = torch.cat([cos[..., :half]] * 2, -1), torch.cat([sin[..., :half]] * 2, -1)
    return reference.apply_rotary(q, k, cos, sin, **options)


def _values(cache: Tensor, scale: Tensor | None) -> Tensor:
    return cache if scale is None else cache.to(scale.dtype) * scale[..., None]


def _never_rounded(**inputs: Any) -> Any:
    """The reference, its int8 caches holding the values themselves: they are what every rounding is to be near."""
    for x in "kv":
        inputs[f"{x}_cache"] = _values(inputs[f"{x}_cache"], inputs.pop(f"{x}_scale", None))
    return _with_caches(reference.apply_rotary_cache)(**inputs)


def _with_caches(op: Callable[..., Tensor]) -> Callable[..., Any]:
    """An op that fills caches, returning them too, so that they are compared: of int8 caches their values."""

    def call(**inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        q = op(**inputs)
        k, v = (_values(inputs[f"{x}_cache"], inputs.get(f"{x}_scale")) for x in "kv")
        return q, k, v

    return call


def _slot_off_by_one(positions: Tensor, slots: Tensor | None = None, **inputs: Any) -> Any:
    slots = ((positions if slots is None else slots) + 1) % inputs["k_cache"].shape[2]
    return reference.apply_rotary_cache(positions=positions, slots=slots, **inputs)


def _position_off_by_one(positions: Tensor, slots: Tensor | None = None, **inputs: Any) -> Any:
    slots = positions if slots is None else slots
    positions = (positions + 1) % inputs["k_cache"].shape[2]
    return reference.apply_rotary_cache(positions=positions, slots=slots, **inputs)


def _slots_ignored(slots: Tensor | None = None, **inputs: Any) -> Any:
    return reference.apply_rotary_cache(**inputs)


def _slots_for_positions(positions: Tensor, slots: Tensor | None = None, **inputs: Any) -> Any:
    return reference.apply_rotary_cache(positions=positions if slots is None else slots, slots=slots, **inputs)


def _k_cached_unturned(k: Tensor, **inputs: Any) -> Any:
    unturned = {**inputs, "cos": torch.ones_like(inputs["cos"]), "sin": torch.zeros_like(inputs["sin"])}
    q = reference.apply_rotary_cache(k=k, **inputs)
    reference.apply_rotary_cache(k=k, **unturned)
    return q


def _v_turned(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, **inputs: Any) -> Any:
    reference.apply_rotary_cache(k=v, v=v, k_cache=v_cache, v_cache=v_cache.clone(), **inputs)
    return reference.apply_rotary_cache(k=k, v=v, k_cache=k_cache, v_cache=v_cache.clone(), **inputs)


def _k_and_v_swapped(k_cache: Tensor, v_cache: Tensor, **inputs: Any) -> Any:
    return reference.apply_rotary_cache(k_cache=v_cache, v_cache=k_cache, **inputs)


def _scales_kept(**inputs: Any) -> Any:
    kept = {name: inputs[name].clone() for name in ("k_scale", "v_scale") if inputs.get(name) is not None}
    return reference.apply_rotary_cache(**{**inputs, **kept})


def _pages_in_order(block_table: Tensor | None = None, **inputs: Any) -> Any:
    if block_table is not None:
        block_table = torch.arange(block_table.numel(), dtype=torch.int32).view_as(block_table)
    return reference.apply_rotary_cache(block_table=block_table, **inputs)


def _cut_off(**inputs: Any) -> Any:
    if inputs.get("k_scale") is None:
        return reference.apply_rotary_cache(**inputs)
    wide = {f"{x}_cache": torch.zeros_like(inputs[f"{x}_cache"], dtype=inputs["k"].dtype) for x in "kv"}
    q = reference.apply_rotary_cache(**{**inputs, **wide, "k_scale": None, "v_scale": None})
    reference.apply_rotary_cache(**inputs)
    for x in "kv":
        written = wide[f"{x}_cache"] != 0
        steps = wide[f"{x}_cache"].float() / inputs[f"{x}_scale"][..., None]
        inputs[f"{x}_cache"][written] = steps.trunc().to(torch.int8)[written]
    return q


CASES = (
    OpCases(
        op="apply_rotary",
        call=apply_rotary,
        reference=reference.apply_rotary,
        torch=torch_rotary,
        rival="transformers apply_rotary_pos_emb",
        cases=_cases(),
        mutants={
            "the angle's sign is flipped": _sign_flipped,
            "the halves are swapped": _halves_swapped,
            "a token takes its neighbour's angle": _next_position,
            "pairs are the other kind's": _other_pairs,
            "lanes beyond rotary_dim turn too": _all_lanes,
            "k is not turned": _k_untouched,
            "every sequence takes the first one's angles": _first_sequence,
            "a pair's second lane takes the first's cos": _one_cos_a_pair,
        },
    ),
    OpCases(
        op="apply_rotary_cache",
        call=_with_caches(apply_rotary_cache),
        reference=_never_rounded,
        torch=_with_caches(torch_rotary_cache),
        rival="transformers apply_rotary_pos_emb and StaticCache",
        cases=_cases_cache(),
        mutants={
            "slots are off by one": _with_caches(_slot_off_by_one),
            "positions are off by one": _with_caches(_position_off_by_one),
            "slots are ignored": _with_caches(_slots_ignored),
            "slots serve as positions": _with_caches(_slots_for_positions),
            "k is cached before it turns": _with_caches(_k_cached_unturned),
            "v turns too": _with_caches(_v_turned),
            "k and v go to each other's cache": _with_caches(_k_and_v_swapped),
            "an int8 cache's scales stay as they were": _with_caches(_scales_kept),
            "the table of pages is ignored": _with_caches(_pages_in_order),
            "int8 is cut off, not rounded": _with_caches(_cut_off),
        },
    ),
)
