"""Shapes, inputs and PyTorch's own way, for tests, verify and bench."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor

from ...quant.activations import Int8Activations, activation_group, dequantize_activations, quantize_activations
from ...quant.tensor import QuantizedTensor, store_integers
from .._case import Case, OpCases
from . import reference
from .api import quant_matmul


def torch_linear(
    x: Tensor | Int8Activations, w: QuantizedTensor | Tensor, bias: Tensor | None = None, *, activations: str = "float"
) -> Tensor:
    """F.linear on the dequantised weight; with int8 activations on activations that were rounded and widened again.

    A weight that is dense already is `bench`'s: the float layer that a quantised one replaces, which rounds nothing.
    """
    if isinstance(x, Int8Activations):
        x = x.dequantize()
    if isinstance(w, Tensor):
        return torch.nn.functional.linear(x, w, bias)
    if activations == "int8":
        x = reference.round_activations(x, activation_group(w.group_size), torch.float32).to(x.dtype)
    return torch.nn.functional.linear(x, w.dequantize(x.dtype), bias)


def _dense(inputs: dict[str, Any]) -> dict[str, Any]:
    x = inputs["x"]
    return {**inputs, "x": x if isinstance(x, Tensor) else x.dequantize(), "w": inputs["w"].dequantize(x.dtype)}


def random_weight(
    g: Generator, n: int, k: int, bits: int, group_size: int, form: str, scale_dtype: torch.dtype = torch.float16
) -> QuantizedTensor:
    """Integers over the whole range. form: "minimum" as Q4_1, "zero" as Q4_0 and Q8_0, "both" as GPTQ's odd zero points."""
    group_size = k if group_size == -1 else group_size
    shape = (n, k // group_size)
    q = torch.randint(0, 1 << bits, (n, k), generator=g, dtype=torch.uint8)
    scale = (0.5 + torch.rand(shape, generator=g)) * (0.1 / (1 << bits - 1))
    minimum = -scale * (1 << bits - 1) * (0.8 + 0.4 * torch.rand(shape, generator=g))
    zero = {"minimum": 0, "zero": 1 << bits - 1, "both": 5}[form]
    return QuantizedTensor.make(
        store_integers(q, bits),
        scale.to(scale_dtype),
        None if form == "zero" else minimum.to(scale_dtype),
        zero=zero,
        shape=(n, k),
        bits=bits,
        group_size=group_size,
    ).pack()


def _inputs(
    m: int | tuple[int, ...],
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    bits: int = 4,
    group_size: int = 32,
    form: str = "minimum",
    activations: str = "float",
    rounded: bool = False,
    bias: bool = False,
    mean: float = 0.0,
    outliers: bool = False,
    strided: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> Callable[[Generator], dict[str, Any]]:
    def make(g: Generator) -> dict[str, Any]:
        shape = (m, k) if isinstance(m, int) else (*m, k)
        x = torch.randn(shape, generator=g) + mean
        if outliers:
            x[..., ::97] *= 1000.0 if dtype != torch.float16 else 100.0
            x[..., k // 2 : k // 2 + 128] = 0.0  # whole groups
        x = x.to(dtype)
        if strided:  # every other row of a larger buffer
            x = torch.stack([x, x.flip(-1)], -2)[..., 0, :]
        kwargs: dict[str, Any] = {"x": x, "w": random_weight(g, n, k, bits, group_size, form, scale_dtype)}
        if rounded:
            kwargs["x"] = Int8Activations.of(x, activation_group(kwargs["w"].group_size))
            if strided:
                data = kwargs["x"].data
                kwargs["x"] = replace(kwargs["x"], data=torch.stack([data, data.flip(-1)], -2)[..., 0, :])
        else:
            kwargs["activations"] = activations
        if bias:
            kwargs["bias"] = torch.randn(n, generator=g).to(dtype)
        return kwargs

    return make


_LLAMA_1B = {
    "qkv": (3072, 2048),
    "output": (2048, 2048),
    "gate up": (16384, 2048),
    "down": (2048, 8192),
    "head": (128256, 2048),
}


def _cases() -> list[Case]:
    cases = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):

        def add(name: str, m: int | tuple[int, ...], n: int, k: int, _dtype: torch.dtype = dtype, **options: Any) -> None:
            bench, gpu = options.pop("bench", False), options.pop("gpu", False)
            bits, rows = options.get("bits", 4), torch.Size([m] if isinstance(m, int) else m).numel()
            group_size = options.get("group_size", 32)
            scales = n * (1 if group_size == -1 else k // group_size) * (2 if options.get("form") == "zero" else 4)
            size = n * k * bits // 8 + scales + rows * (n + k) * _dtype.itemsize
            for activations in ("float", "int8"):
                make = _inputs(m, n, k, _dtype, activations=activations, **options)
                floats = "bf16" if _dtype == torch.bfloat16 else "fp32"
                arithmetic = f"int{bits}" if activations == "int8" else floats
                title = f"{name} {activations} activations"
                cases.append(Case(title, _dtype, make, size, 2 * rows * n * k, bench, gpu, arithmetic=arithmetic))

        for part, (n, k) in _LLAMA_1B.items():
            add(f"llama-3.2-1b {part} decode 1x{n}x{k} int4 g32", 1, n, k, bench=True)
            if part != "head":
                add(f"llama-3.2-1b {part} prefill 512x{n}x{k} int4 g32", 512, n, k, bench=True)
        add(
            "llama-3.2-1b gate up decode 1x16384x2048 int8 rows", 1, 16384, 2048, bits=8, group_size=-1, form="zero", bench=True
        )
        add(
            "llama-3.2-1b gate up prefill 512x16384x2048 int8 rows",
            512,
            16384,
            2048,
            bits=8,
            group_size=-1,
            form="zero",
            bench=True,
        )
        if dtype == torch.bfloat16:
            for rows in (1, 16, 512, 4096):
                shape = f"{rows}x14336x4096"
                add(f"llama-3.1-8b gate {shape} int4 g128", rows, 14336, 4096, group_size=128, bench=True, gpu=True)
                rows_only: dict[str, Any] = {"bits": 8, "group_size": -1, "form": "zero"}
                add(f"llama-3.1-8b gate {shape} int8 rows", rows, 14336, 4096, bench=True, gpu=True, **rows_only)
        add("smollm2-135m qkv 1x960x576", 1, 960, 576)
        add("smollm2-135m down 5x576x1536", 5, 576, 1536)
        add("int4 g32 minimum 31x40x576", 31, 40, 576, bias=True)
        add("int4 g32 zero 7x33x64", 7, 33, 64, form="zero")
        add("int4 g32 both 3x17x96", 3, 17, 96, form="both", scale_dtype=torch.bfloat16)
        add("int4 g64 minimum 4x50x1536", 4, 50, 1536)
        add("int4 g64 zero 13x50x192", 13, 50, 192, form="zero", group_size=64, scale_dtype=torch.float32, bias=True)
        add("int4 g128 minimum 2x50x640", 2, 50, 640, group_size=128)
        add("int4 row zero 1x131x131", 1, 131, 131, group_size=-1, form="zero")
        add("int4 row minimum 9x19x1031", 9, 19, 1031, group_size=-1)
        add("int4 row minimum 3x20x64", 3, 20, 64, group_size=-1)  # one group of 64: fewer columns than kernels step by
        add("int8 row zero 1x65x576", 1, 65, 576, bits=8, group_size=-1, form="zero", bias=True)
        add("int8 row zero 33x47x131", 33, 47, 131, bits=8, group_size=-1, form="zero")
        add("int8 g32 zero 2x3x7x47x544", (2, 3, 7), 47, 544, bits=8, form="zero")
        add("int8 g32 minimum 5x15x64", 5, 15, 64, bits=8, scale_dtype=torch.float32)
        add("int8 g128 both 6x16x256", 6, 16, 256, bits=8, group_size=128, form="both")
        # For a warp's and a team's ring of copies that goes round, and parts of K that are added by a kernel of their own.
        add("int4 g32 minimum 2x80x4224", 2, 80, 4224, scale_dtype=torch.float32)
        add("int8 g64 zero 3x20x4224", 3, 20, 4224, bits=8, group_size=64, form="zero", bias=True)
        add("int4 g32 zero 40x50x544", 40, 50, 544, form="zero")
        add("int8 g128 both 20x40x384", 20, 40, 384, bits=8, group_size=128, form="both", bias=True)
        # Segments of K whose sums are kept in between, for tiles of many tokens.
        add("int4 g32 both 29x50x1184", 29, 50, 1184, form="both", scale_dtype=torch.float32)
        add("int8 g32 zero 29x50x1184", 29, 50, 1184, bits=8, form="zero")
        add("one row, one column 1x1x1", 1, 1, 1, group_size=-1)
        add("short 4x2x5 int8", 4, 2, 5, bits=8, group_size=-1)
        add("no tokens 0x16x64", 0, 16, 64)
        add("strided 6x20x160", 6, 20, 160, strided=True)
        add("more tokens than a pass 530x18x64", 530, 18, 64)
        add("activations with a mean 8x40x640", 8, 40, 640, mean=1.0)
        add("activations with a mean 1x40x640 int8", 1, 40, 640, mean=1.0, bits=8, group_size=64, form="zero")
        add("outliers and empty groups 5x48x1056", 5, 48, 1056, outliers=True)
    return cases


def _cases_int8() -> list[Case]:
    """Activations that were rounded before."""
    cases = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):

        def add(name: str, m: int | tuple[int, ...], n: int, k: int, _dtype: torch.dtype = dtype, **options: Any) -> None:
            bench, gpu = options.pop("bench", False), options.pop("gpu", False)
            bits, rows = options.get("bits", 4), torch.Size([m] if isinstance(m, int) else m).numel()
            group_size = options.get("group_size", 32)
            scales = n * (1 if group_size == -1 else k // group_size) * (2 if options.get("form") == "zero" else 4)
            groups = rows * -(-k // activation_group(group_size))
            size = n * k * bits // 8 + scales + rows * (k + n * _dtype.itemsize) + 8 * groups
            make = _inputs(m, n, k, _dtype, rounded=True, **options)
            cases.append(Case(name, _dtype, make, size, 2 * rows * n * k, bench, gpu, arithmetic=f"int{bits}"))

        for part in ("qkv", "gate up", "down"):  # what reads a norm or a gate
            n, k = _LLAMA_1B[part]
            add(f"llama-3.2-1b {part} decode 1x{n}x{k} int4 g32", 1, n, k, bench=True)
            add(f"llama-3.2-1b {part} prefill 512x{n}x{k} int4 g32", 512, n, k, bench=True)
        if dtype == torch.bfloat16:
            for rows in (1, 16, 512, 4096):
                name = f"llama-3.1-8b gate {rows}x14336x4096 int4 g128"
                add(name, rows, 14336, 4096, group_size=128, bench=True, gpu=True)
        add("int4 g32 minimum 31x40x576", 31, 40, 576, bias=True)
        add("int4 g32 zero 7x33x64", 7, 33, 64, form="zero")
        add("int4 g32 both 3x17x96", 3, 17, 96, form="both", scale_dtype=torch.bfloat16)
        add("int4 g64 zero 13x50x192", 13, 50, 192, form="zero", group_size=64, scale_dtype=torch.float32, bias=True)
        add("int4 g128 minimum 2x50x640", 2, 50, 640, group_size=128)
        add("int4 row zero 1x131x131", 1, 131, 131, group_size=-1, form="zero")
        add("int4 row minimum 9x19x1031", 9, 19, 1031, group_size=-1)
        add("int4 row minimum 3x20x64", 3, 20, 64, group_size=-1)  # one group of 64: fewer columns than kernels step by
        add("int8 row zero 33x47x131", 33, 47, 131, bits=8, group_size=-1, form="zero", bias=True)
        add("int8 g32 zero 2x3x7x47x544", (2, 3, 7), 47, 544, bits=8, form="zero")
        add("int8 g32 minimum 5x15x64", 5, 15, 64, bits=8, scale_dtype=torch.float32)
        add("int8 g128 both 6x16x256", 6, 16, 256, bits=8, group_size=128, form="both")
        add("int4 g32 minimum 2x80x4224", 2, 80, 4224, scale_dtype=torch.float32)
        add("int4 g32 zero 40x50x544", 40, 50, 544, form="zero")
        add("int4 g32 both 29x50x1184", 29, 50, 1184, form="both", scale_dtype=torch.float32)
        add("one column 5x1x1", 5, 1, 1, group_size=-1)
        add("short 4x2x5 int8", 4, 2, 5, bits=8, group_size=-1)
        add("no tokens 0x16x64", 0, 16, 64)
        add("strided 6x20x160", 6, 20, 160, strided=True)
        add("more tokens than a pass 530x18x64", 530, 18, 64)
        add("activations with a mean 8x40x640", 8, 40, 640, mean=1.0)
        add("outliers and empty groups 5x48x1056", 5, 48, 1056, outliers=True)
    return cases


def _with(change: Callable[[QuantizedTensor], QuantizedTensor]) -> Callable[..., Tensor]:
    """The reference on a weight that was changed in the canonical layout."""

    def wrong(x: Tensor, w: QuantizedTensor, bias: Tensor | None = None, *, activations: str = "float") -> Tensor:
        return reference.quant_matmul(x, change(w.unpack()), bias, activations=activations)

    return wrong


def _swap_nibbles(w: QuantizedTensor) -> QuantizedTensor:
    return replace(w, data=(w.data << 4) | (w.data >> 4)) if w.bits == 4 and w.shape[1] % 2 == 0 else w


def _activation_scales_forgotten(
    x: Tensor, w: QuantizedTensor, bias: Tensor | None = None, *, activations: str = "float"
) -> Tensor:
    if activations == "int8":
        group_size = activation_group(w.group_size)
        q, scale = quantize_activations(x, group_size)
        x = dequantize_activations(q, scale.mean(-1, keepdim=True).expand_as(scale), group_size, torch.float64)
    return reference.quant_matmul(x, w, bias)


def _activations_truncated(x: Tensor, w: QuantizedTensor, bias: Tensor | None = None, *, activations: str = "float") -> Tensor:
    if activations == "int8":
        group_size = activation_group(w.group_size)
        _, scale = quantize_activations(x, group_size)
        exact = x / scale.double().repeat_interleave(group_size, -1)[..., : x.shape[-1]]
        x = dequantize_activations(exact.nan_to_num(0.0).trunc(), scale, group_size, torch.float64)
    return reference.quant_matmul(x, w, bias)


def _activations_not_quantized(
    x: Tensor, w: QuantizedTensor, bias: Tensor | None = None, *, activations: str = "float"
) -> Tensor:
    return reference.quant_matmul(x, w, bias)


def _last_column_dropped(x: Tensor, w: QuantizedTensor, bias: Tensor | None = None, *, activations: str = "float") -> Tensor:
    x = x.clone()
    x[..., -1:] = 0
    return reference.quant_matmul(x, w, bias, activations=activations)


def _no_bias(x: Tensor, w: QuantizedTensor, bias: Tensor | None = None, *, activations: str = "float") -> Tensor:
    return reference.quant_matmul(x, w, activations=activations)


def _given(change: Callable[[Int8Activations], Int8Activations]) -> Callable[..., Tensor]:
    """The reference on integers that were changed."""

    def wrong(x: Int8Activations, w: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
        return reference.quant_matmul(change(x), w, bias)

    return wrong


def _one_scale(x: Int8Activations) -> Int8Activations:
    return replace(x, groups=x.groups.mean(-2, keepdim=True).expand_as(x.groups))


def _last_integer_dropped(x: Int8Activations) -> Int8Activations:
    data = x.data.clone()
    data[..., -1:] = 0
    return replace(x, data=data)


_WRONG_WEIGHTS = {
    "zero is off by one": _with(lambda w: replace(w, zero=w.zero + 1)),
    "scales are shifted by one group": _with(lambda w: replace(w, scale=w.scale.roll(1, dims=1))),
    "minimums are shifted by one group": _with(
        lambda w: w if w.minimum is None else replace(w, minimum=w.minimum.roll(1, dims=1))
    ),
    "minimum is dropped": _with(lambda w: replace(w, minimum=None)),
    "nibbles are swapped": _with(_swap_nibbles),
    "two rows of a block are swapped": _with(lambda w: replace(w, data=w.data.flip(0))),
    "bias is dropped": _no_bias,
}

CASES = (
    OpCases(
        op="quant_matmul",
        call=quant_matmul,
        reference=reference.quant_matmul,
        torch=torch_linear,
        rival="F.linear on a weight dequantised beforehand",
        held_by_torch=_dense,
        cases=_cases(),
        compute_bound=lambda case: case.flops >= 16 * case.bytes,  # from about 32 tokens on
        mutants={
            **_WRONG_WEIGHTS,
            "last column is dropped": _last_column_dropped,
            "one scale of activations serves all groups": _activation_scales_forgotten,
            "activations are truncated, not rounded": _activations_truncated,
            "activations are not quantised": _activations_not_quantized,
        },
    ),
    OpCases(
        op="quant_matmul_int8",
        call=quant_matmul,
        reference=reference.quant_matmul,
        torch=torch_linear,
        rival="F.linear on a weight and activations dequantised beforehand",
        held_by_torch=_dense,
        cases=_cases_int8(),
        compute_bound=lambda case: case.flops >= 16 * case.bytes,
        mutants={
            **_WRONG_WEIGHTS,
            "last column is dropped": _given(_last_integer_dropped),
            "one scale of activations serves all groups": _given(_one_scale),
            "scales of activations are shifted by one group": _given(lambda x: replace(x, groups=x.groups.roll(1, -2))),
            "integers are read as unsigned": _given(lambda x: replace(x, data=x.data.view(torch.uint8))),
        },
    ),
)
