"""Shapes, inputs and PyTorch's own way, for tests, verify and bench."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...quant import quantize_rows
from .._case import Case, OpCases
from . import reference
from .api import attention


def torch_attention(
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
    """SDPA; for softcap and sinks, which it lacks, transformers' eager attention of Gemma 2 and GPT-OSS, op for op. Pages are
    gathered and int8 is dequantised to q's dtype beforehand."""
    if k.dtype in (torch.bfloat16, torch.float16):
        k, v = k.to(q.dtype), v.to(q.dtype)
    if block_table is not None or k_scale is not None:
        k, v = (reference.whole(x, scale, block_table, kv_lens).to(q.dtype) for x, scale in ((k, k_scale), (v, v_scale)))
        k, v = reference.valid(k, kv_lens), reference.valid(v, kv_lens)
    B, H, T, D = q.shape
    G, S = H // k.shape[1], k.shape[2]
    aligned = window is None and mask is None and kv_lens is None and (not causal or T in (1, S))
    additive = None
    if not aligned:
        see = reference.visible(q, k, causal, window, kv_lens)
        additive = torch.zeros(see.shape, dtype=q.dtype).masked_fill(~see, -math.inf)
        if mask is not None:
            hide = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask
            additive = (additive + hide).to(q.dtype)
    if softcap is None and sinks is None:
        if torch.__version__ < "2.5":  # it had no grouped heads
            k, v = (x.repeat_interleave(G, 1) for x in (k, v))
        grouped = {"enable_gqa": True} if k.shape[1] != H else {}
        is_causal = aligned and causal and T > 1
        return scaled_dot_product_attention(q, k, v, attn_mask=additive, is_causal=is_causal, scale=scale, **grouped)
    k, v = (x.repeat_interleave(G, 1) for x in (k, v))
    score = q @ k.transpose(2, 3) * (D**-0.5 if scale is None else scale)
    if softcap is not None:
        score = torch.tanh(score / softcap) * softcap
    if additive is not None:
        score = score + additive
    elif causal:
        score = score + torch.full((T, S), -math.inf, dtype=q.dtype).triu(S - T + 1)
    if sinks is not None:
        score = torch.cat([score, sinks.to(q.dtype).view(1, H, 1, 1).expand(B, H, T, 1)], -1)
        score = score - score.max(-1, keepdim=True).values
    p = torch.softmax(score, -1, dtype=torch.float32).to(q.dtype)
    return p[..., :S] @ v


def _visible_pairs(B: int, T: int, S: int, causal: bool = True, window: int | None = None, **_: Any) -> int:
    """Pairs of a query and a key that it sees, masks and lengths aside."""
    pairs = 0
    for t in range(T):
        position = S - T + t
        low = 0 if window is None else max(0, position - window + 1)
        high = position + 1 if causal else (S if window is None else min(S, position + window))
        pairs += max(0, high - low)
    return B * pairs


def _qkv(g: Generator, B: int, H: int, Hk: int, T: int, S: int, D: int, dtype: torch.dtype) -> dict[str, Any]:
    """As models pass them: q a view of (B, T, H, D), k and v of a cache that is longer than they are."""
    q = torch.randn(B, T, H, D, generator=g).to(dtype).transpose(1, 2)
    k, v = (torch.randn(B, Hk, S + 5, D, generator=g).to(dtype)[:, :, :S] for _ in range(2))
    return {"q": q, "k": k, "v": v}


Extra = Callable[[dict[str, Any], Generator], None]  # changes or adds arguments


def _sinks(inputs: dict[str, Any], g: Generator) -> None:
    inputs["sinks"] = torch.randn(inputs["q"].shape[1], generator=g).to(inputs["q"].dtype) + 1


def _lens(*lens: int) -> Extra:
    def add(inputs: dict[str, Any], g: Generator) -> None:
        inputs["kv_lens"] = torch.tensor(lens)

    return add


def _mask(*shape: int, boolean: bool, dtype: torch.dtype | None = None) -> Extra:
    def add(inputs: dict[str, Any], g: Generator) -> None:
        hidden = torch.rand(shape, generator=g) < 0.4
        hidden[..., :1] = False  # so that no row is hidden as a whole, where PyTorch's own ways give NaN
        if boolean:
            inputs["mask"] = ~hidden
        else:
            bias = torch.randn(shape, generator=g).to(dtype or inputs["q"].dtype)
            inputs["mask"] = bias.masked_fill(hidden, -math.inf)

    return add


def _lowest_mask(inputs: dict[str, Any], g: Generator) -> None:
    """As transformers builds them: left padding, the lowest number of the dtype in place of minus infinity."""
    B, _, T, _ = inputs["q"].shape
    S = inputs["k"].shape[2]
    mask = torch.zeros(B, 1, T, S, dtype=inputs["q"].dtype)
    mask[:, :, :, :7] = torch.finfo(mask.dtype).min
    inputs["mask"] = mask


def _scaled(factor: float) -> Extra:
    def scale(inputs: dict[str, Any], g: Generator) -> None:
        inputs["q"] = inputs["q"] * factor

    return scale


def _smaller(inputs: dict[str, Any], g: Generator) -> None:
    """Values so small that fp16 could not hold a weight times a step of their int8."""
    inputs["v"] = inputs["v"] * 1e-3


def _interleaved(inputs: dict[str, Any], g: Generator) -> None:
    """k and v as views of one (B, S, 2, Hk, D) buffer, as a fused projection leaves them."""
    joint = torch.stack([inputs["k"], inputs["v"]]).permute(1, 3, 0, 2, 4).contiguous()
    inputs["k"], inputs["v"] = (joint[:, :, i].transpose(1, 2) for i in range(2))


def _kept_in(dtype: torch.dtype) -> Extra:
    """A cache of fewer bits than the queries."""

    def narrow(inputs: dict[str, Any], g: Generator) -> None:
        inputs["k"], inputs["v"] = inputs["k"].to(dtype), inputs["v"].to(dtype)

    return narrow


def _int8(inputs: dict[str, Any], g: Generator) -> None:
    """As a cache keeps them: tokens of different sizes, so that a scale belongs to one token."""
    for name in "kv":
        x = inputs[name]
        size = torch.exp(torch.randn(*x.shape[:3], 1, generator=g) / 2)
        inputs[name], inputs[f"{name}_scale"] = quantize_rows(x * size)


def _paged(page: int, *lens: int, max_pages: int = 0, dtype: torch.dtype = torch.int32, int8: bool = False) -> Extra:
    """k and v cut into the pages of a pool, in no order. What no length covers holds NaN (where an integer cannot, its scale
    does), and a table names pages of NaN where none is in use: a wrong kernel is to be noticed, not to end the process."""

    def add(inputs: dict[str, Any], g: Generator) -> None:
        if int8:
            _int8(inputs, g)
        used = [-(-n // page) for n in lens]
        order = torch.randperm(sum(used) + 3, generator=g)  # three pages are nobody's
        table = torch.full((len(lens), max(max_pages, *used)), int(order[-1]), dtype=dtype)
        pools = {name: inputs[name] for name in ("k", "v", "k_scale", "v_scale") if name in inputs}
        for name, x in pools.items():
            shape = (len(order), x.shape[1], page, *x.shape[3:])
            inputs[name] = torch.full(shape, math.nan if x.is_floating_point() else 77, dtype=x.dtype)
        for b, n in enumerate(lens):
            for i in range(used[b]):
                table[b, i], order = order[0], order[1:]
                rows = slice(i * page, min(n, (i + 1) * page))
                for name, x in pools.items():
                    inputs[name][table[b, i], :, : rows.stop - rows.start] = x[b, :, rows]
        inputs["block_table"], inputs["kv_lens"] = table, torch.tensor(lens)

    return add


def _both(*extras: Extra) -> Extra:
    def add(inputs: dict[str, Any], g: Generator) -> None:
        for extra in extras:
            extra(inputs, g)

    return add


def _cases() -> list[Case]:
    cases = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):

        def add(
            name: str,
            *shape: int,
            extra: Extra | None = None,
            bench: bool = False,
            gpu: bool = False,
            _dtype: torch.dtype = dtype,
            **options: Any,
        ) -> None:
            B, H, Hk, T, S, D = shape

            def make(g: Generator) -> dict[str, Any]:
                inputs = {**_qkv(g, B, H, Hk, T, S, D, _dtype), **options}
                if extra is not None:
                    extra(inputs, g)
                return inputs

            size = 2 * B * H * T * D * _dtype.itemsize + 2 * B * Hk * S * (D + 4 if extra is _int8 else D * _dtype.itemsize)
            flops = 4 * D * H * _visible_pairs(B, T, S, **options)
            arithmetic = "bf16" if _dtype == torch.bfloat16 and extra is not _int8 else "fp32"
            cases.append(Case(name, _dtype, make, size, flops, bench, gpu, arithmetic=arithmetic))

        # B, H, Hk, T, S, D
        add("llama-3.2-1b prefill 2048", 1, 32, 8, 2048, 2048, 64, bench=True)
        add("llama-3.2-1b prefill 512", 1, 32, 8, 512, 512, 64, bench=True)
        add("llama-3.2-1b decode 2048", 1, 32, 8, 1, 2048, 64, bench=True)
        add("smollm2-135m prefill 512", 1, 9, 3, 512, 512, 64, bench=True)
        add("smollm2-135m decode 512", 1, 9, 3, 1, 512, 64, bench=True)
        add("llama-3.1-8b decode 2048", 1, 32, 8, 1, 2048, 128, bench=True)
        if dtype == torch.bfloat16:
            add("llama-3.1-8b prefill 8192", 1, 32, 8, 8192, 8192, 128, bench=True, gpu=True)
            add("llama-3.1-8b decode 16384", 8, 32, 8, 1, 16384, 128, bench=True, gpu=True)
            add("llama-3.1-8b decode 65536", 1, 32, 8, 1, 65536, 128, bench=True, gpu=True)
        add("llama-3.2-1b decode 2048, int8", 1, 32, 8, 1, 2048, 64, extra=_int8, bench=True)
        add("causal T 131 S 131", 1, 4, 2, 131, 131, 64)
        add("causal T 37 S 200", 2, 6, 2, 37, 200, 32)
        add("causal T 50 S 20: the first see nothing", 1, 2, 2, 50, 20, 16)
        add("bidirectional cross T 33 S 75", 2, 3, 1, 33, 75, 48, causal=False)
        add("bidirectional cross T 75 S 7", 1, 2, 2, 75, 7, 40, causal=False)
        add("window 17 T 140", 1, 4, 2, 140, 140, 64, window=17)
        add("window 17 T 30 S 140 bidirectional", 1, 4, 2, 30, 140, 64, window=17, causal=False)
        add("window 100 decode S 700", 1, 6, 2, 1, 700, 64, window=100)
        add("softcap 5", 1, 4, 2, 70, 70, 64, softcap=5.0, extra=_scaled(3.0))
        add("gemma-2 softcap 50 window 64 D 256", 1, 4, 2, 70, 100, 256, softcap=50.0, window=64, scale=1 / 16)
        add("softcap 50 decode", 2, 4, 2, 1, 290, 64, softcap=50.0)
        add("gpt-oss sinks window 32", 1, 8, 2, 66, 66, 64, window=32, extra=_sinks)
        add("sinks decode S 600", 1, 8, 2, 1, 600, 64, extra=_sinks)
        add("boolean mask", 2, 4, 2, 34, 66, 64, causal=False, extra=_mask(2, 1, 34, 66, boolean=True))
        add("boolean mask over heads, causal", 2, 4, 2, 30, 66, 64, extra=_mask(4, 1, 66, boolean=True))
        add("additive mask", 2, 4, 2, 34, 66, 64, extra=_mask(2, 4, 34, 66, boolean=False))
        add("additive fp32 mask decode", 2, 4, 2, 1, 266, 64, extra=_mask(2, 1, 1, 266, boolean=False, dtype=torch.float32))
        add("additive mask, same for all keys", 1, 2, 2, 20, 20, 64, extra=_mask(20, 1, boolean=False))
        add("transformers mask, lowest float", 1, 2, 2, 20, 20, 64, extra=_lowest_mask)
        add("kv_lens prefill", 3, 4, 2, 20, 90, 64, extra=_lens(20, 57, 90))
        add("kv_lens decode", 4, 4, 2, 1, 600, 64, extra=_lens(1, 256, 301, 600))
        add("kv_lens window bidirectional", 2, 2, 2, 20, 90, 64, causal=False, window=30, extra=_lens(25, 90))
        add("multi-query", 1, 8, 1, 5, 70, 64)
        add("multi-query decode", 2, 12, 1, 1, 300, 64)
        add("multi-head decode T 2", 2, 3, 3, 2, 300, 80)
        add("decode T 3 D 96", 1, 6, 3, 3, 261, 96)
        add("D 128", 1, 2, 1, 65, 65, 128)
        add("D 96", 1, 2, 1, 50, 65, 96)
        add("D 80", 1, 2, 1, 50, 65, 80)
        add("D 512", 1, 2, 1, 20, 65, 512)
        add("odd D 13", 1, 2, 1, 30, 41, 13)
        add("odd D 13 decode", 3, 16, 8, 1, 41, 13)
        add("D 1", 1, 2, 1, 9, 9, 1)
        add("one key", 2, 4, 2, 1, 1, 64)
        add("decode D 576", 1, 4, 1, 1, 70, 576)
        add("scale 0.3", 1, 2, 1, 40, 40, 64, scale=0.3)
        add("scale -0.3", 1, 2, 1, 40, 40, 64, scale=-0.3)
        add("scale -0.3 decode", 1, 8, 2, 1, 150, 64, scale=-0.3)
        add("long keys 5000", 1, 4, 2, 12, 5000, 32)
        add("long keys 5000 decode", 1, 4, 2, 1, 5000, 32)
        add("large scores", 2, 6, 3, 40, 40, 64, extra=_scaled(100.0))
        add("large scores decode", 4, 32, 16, 1, 400, 64, extra=_scaled(30.0))
        add("strided keys", 2, 4, 2, 40, 40, 64, extra=_interleaved)
        add("strided keys decode", 2, 16, 8, 1, 40, 64, extra=_interleaved)
        add("pages of 16", 3, 4, 2, 1, 300, 64, extra=_paged(16, 1, 150, 300))
        add("pages of 64, T 3", 2, 4, 2, 3, 290, 64, extra=_paged(64, 290, 67, max_pages=7, dtype=torch.int64))
        add("pages of 20, a longer table", 2, 16, 2, 1, 270, 32, extra=_paged(20, 41, 270, max_pages=20))
        add("pages of 128, none in use", 2, 4, 1, 1, 140, 64, extra=_paged(128, 0, 140))
        add("pages of 1", 1, 4, 2, 1, 70, 40, extra=_paged(1, 70))
        add("pages of 16 prefill", 2, 4, 2, 20, 90, 64, extra=_paged(16, 90, 31))
        add("pages of 64 prefill, window 30", 2, 2, 1, 40, 200, 64, window=30, extra=_paged(64, 200, 111))
        add("pages of 16, window 100", 2, 6, 2, 1, 600, 32, window=100, extra=_paged(16, 333, 600))
        add("pages of 16, sinks, softcap 9", 2, 8, 2, 1, 200, 64, softcap=9.0, extra=_both(_paged(16, 200, 9), _sinks))
        add("pages of 16, mask", 2, 4, 2, 1, 96, 64, extra=_both(_paged(16, 96, 50), _mask(2, 1, 1, 96, boolean=True)))
        add("int8", 2, 6, 2, 1, 300, 64, extra=_int8)
        add("int8, lengths, window, sinks", 3, 4, 2, 1, 300, 64, window=90, extra=_both(_int8, _lens(300, 1, 120), _sinks))
        add("int8, additive mask, D 80", 2, 4, 2, 2, 66, 80, extra=_both(_int8, _mask(2, 4, 2, 66, boolean=False)))
        add("int8, small values", 1, 4, 2, 1, 130, 64, extra=_both(_smaller, _int8))
        add("int8, large scores", 2, 8, 2, 1, 200, 64, extra=_both(_scaled(30.0), _int8))
        add("int8, odd D 13, T 3", 2, 4, 2, 3, 300, 13, extra=_int8)
        add("int8 prefill, window 30", 2, 4, 2, 20, 90, 64, window=30, extra=_both(_int8, _lens(31, 90)))
        add("int8 prefill", 2, 4, 2, 20, 90, 64, extra=_int8)
        add("int8, pages of 16", 3, 4, 2, 1, 300, 64, extra=_paged(16, 17, 300, 144, int8=True))
        add("int8, pages of 64, bidirectional", 2, 4, 2, 2, 190, 128, causal=False, extra=_paged(64, 190, 64, int8=True))
        add("int8, pages of 20, multi-query", 4, 16, 1, 1, 150, 64, extra=_paged(20, 150, 99, 20, 57, int8=True))
        add("int8, pages of 16 prefill", 1, 4, 2, 40, 90, 64, extra=_paged(16, 77, int8=True))
        add("causal T 150", 1, 1, 1, 150, 150, 64)
        add("D 256 prefill, window 30", 1, 2, 1, 40, 50, 256, window=30)
        add("D 128 decode", 2, 8, 2, 1, 150, 128)
        add("D 256 decode T 2, window 70", 1, 4, 2, 2, 150, 256, window=70)
        add("int8, D 96", 1, 6, 2, 1, 100, 96, extra=_int8)
        add("int8, D 256, lengths", 2, 4, 2, 1, 90, 256, extra=_both(_int8, _lens(33, 90)))
        add("int8, pages of 16, D 80", 1, 4, 2, 2, 90, 80, extra=_paged(16, 85, int8=True))
        add("kv_lens prefill T 70, none and few", 3, 1, 1, 70, 100, 64, extra=_lens(0, 33, 100))
        add(
            "kv_lens prefill T 70, window 20 bidirectional", 2, 2, 2, 70, 100, 64, causal=False, window=20, extra=_lens(81, 100)
        )
        add("pages of 16 prefill T 50 D 128", 1, 2, 1, 50, 90, 128, extra=_paged(16, 77))
        if dtype == torch.float32:
            add("bf16 keys", 2, 6, 2, 1, 300, 64, extra=_kept_in(torch.bfloat16))
            add("fp16 keys, odd D 13", 2, 6, 2, 2, 300, 13, extra=_kept_in(torch.float16))
            add("fp16 keys prefill", 1, 4, 2, 70, 90, 64, extra=_kept_in(torch.float16))
            add("bf16 keys, pages of 16", 2, 6, 2, 1, 60, 64, extra=_both(_kept_in(torch.bfloat16), _paged(16, 60, 31)))
        add("no queries", 1, 4, 2, 0, 9, 64)
        add("no sequences", 0, 4, 2, 3, 9, 64)
    return cases


def _variant(**changes: Callable[[dict[str, Any]], Any]) -> Callable[..., Tensor]:
    """The reference with some arguments replaced, each by a function of all of them."""

    def call(**inputs: Any) -> Tensor:
        return reference.attention(**{**inputs, **{name: change(inputs) for name, change in changes.items()}})

    return call


def _shifted(by: Callable[[int, int], int]) -> Callable[..., Tensor]:
    """Causal, with the diagonal moved by a function of T and S."""

    def call(**inputs: Any) -> Tensor:
        q, k = inputs["q"], inputs["k"]
        if not inputs.get("causal", True) or inputs.get("kv_lens") is not None or inputs.get("mask") is not None:
            return reference.attention(**inputs)
        T, S = q.shape[2], k.shape[2]
        mask = torch.ones(T, S, dtype=torch.bool).tril(S - T + by(T, S))
        if inputs.get("window") is not None:
            mask &= reference.visible(q, k, False, inputs["window"], None)[0, 0]
        return reference.attention(**{**inputs, "causal": False, "mask": mask, "window": None})

    return call


def _by_modulo(**inputs: Any) -> Tensor:
    H, Hk = inputs["q"].shape[1], inputs["k"].shape[1]
    heads = torch.arange(H) % Hk
    return reference.attention(**{**inputs, "k": inputs["k"][:, heads], "v": inputs["v"][:, heads]})


def _last_key_dropped(**inputs: Any) -> Tensor:
    S = inputs["k"].shape[2]
    if inputs.get("mask") is not None or S < 2:
        return reference.attention(**inputs)
    return reference.attention(**{**inputs, "mask": torch.arange(S) < S - 1})


def _with(**changes: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The reference with some tensors replaced where they are given, each by a function of itself."""

    def call(**inputs: Any) -> Tensor:
        given = {name: change(inputs[name]) for name, change in changes.items() if inputs.get(name) is not None}
        return reference.attention(**{**inputs, **given})

    return call


def _in_pages(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The reference with k and v changed where they are pools of pages."""

    def call(**inputs: Any) -> Tensor:
        return (_with(k=change, v=change) if inputs.get("block_table") is not None else reference.attention)(**inputs)

    return call


def _table_ignored(**inputs: Any) -> Tensor:
    """Pages as they lie in the pool, one sequence's after another's."""
    table = inputs.get("block_table")
    if table is not None:
        inputs = {**inputs, "block_table": torch.arange(table.numel()).view(table.shape) % len(inputs["k"])}
    return reference.attention(**inputs)


CASES = OpCases(
    op="attention",
    call=attention,
    reference=reference.attention,
    torch=torch_attention,
    rival="torch SDPA (eager where it lacks softcap or sinks)",
    cases=_cases(),
    compute_bound=lambda case: "prefill" in case.name,
    mutants={
        "a query does not see itself": _shifted(lambda T, S: -1),
        "a query sees the next key": _shifted(lambda T, S: 1),
        "causal is aligned to the start of the keys": _shifted(lambda T, S: T - S),
        "scale is missing": _variant(scale=lambda inputs: 1.0),
        "scale argument is ignored": _variant(scale=lambda inputs: None),
        "scale loses its sign": _variant(scale=lambda inputs: inputs.get("scale") and abs(inputs["scale"])),
        "window is one too wide": _variant(window=lambda inputs: inputs.get("window") and inputs["window"] + 1),
        "window is one too narrow": _variant(window=lambda inputs: inputs.get("window") and max(1, inputs["window"] - 1)),
        "window is ignored": _variant(window=lambda inputs: None),
        "softcap is dropped": _variant(softcap=lambda inputs: None),
        "mask is ignored": _variant(mask=lambda inputs: None),
        "kv_lens is ignored": _variant(kv_lens=lambda inputs: None),
        "sinks are ignored": _variant(sinks=lambda inputs: None),
        "query heads are mapped by modulo": _by_modulo,
        "the last key is dropped": _last_key_dropped,
        "block_table is ignored": _table_ignored,
        "a page is its neighbour in the pool": _in_pages(lambda pool: pool.roll(1, 0)),
        "a page's rows are off by one": _in_pages(lambda pool: pool.roll(1, 2)),
        "a page's heads are swapped": _in_pages(lambda pool: pool.flip(1)),
        "k_scale is dropped": _with(k_scale=torch.ones_like),
        "v_scale is dropped": _with(v_scale=torch.ones_like),
        "k_scale is the next token's": _with(k_scale=lambda scale: scale.roll(-1, 2)),
        "v_scale is the next token's": _with(v_scale=lambda scale: scale.roll(-1, 2)),
        "v_scale is the other head's": _with(v_scale=lambda scale: scale.flip(1)),
    },
)
