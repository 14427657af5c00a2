"""Shapes, inputs and PyTorch's own way, for tests, verify and bench."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from .._case import Case, OpCases
from .._int8_cases import never_rounded, rounded_by, wrong_roundings
from . import reference
from .api import rms_norm


def torch_rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    offset: float = 0.0,
    rounding: str = "llama",
) -> Any:
    """transformers' LlamaRMSNorm and GemmaRMSNorm, op for op."""
    h = x if residual is None else x + residual
    normed = h.float() * torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        y = normed.to(x.dtype)
    elif rounding == "llama":
        y = (weight + offset if offset else weight) * normed.to(x.dtype)
    else:
        y = (normed * (offset + weight.float())).to(x.dtype)
    return y if residual is None else (y, h)


def _inputs(
    *shape: int, dtype: torch.dtype, residual: bool = False, scale: float = 1.0, strided: bool = False, **scalars: Any
) -> Callable[[Generator], dict[str, Any]]:
    def make(g: Generator) -> dict[str, Any]:
        x = (torch.randn(*shape, generator=g) * scale).to(dtype)
        if strided:  # every other row of a larger buffer
            x = torch.stack([x, x.flip(-1)], -2)[..., 0, :]
        kwargs: dict[str, Any] = {
            "x": x,
            "weight": (1 + torch.randn(shape[-1], generator=g) * 0.1).to(dtype),
            **scalars,
        }
        if residual:
            kwargs["residual"] = torch.randn(*shape, generator=g).to(dtype)
        return kwargs

    return make


def _outliers(dtype: torch.dtype, empty: slice = slice(0), **scalars: Any) -> Callable[[Generator], dict[str, Any]]:
    def make(g: Generator) -> dict[str, Any]:
        kwargs = _inputs(5, 576, dtype=dtype, **scalars)(g)
        kwargs["x"][:, ::97] *= 1000.0 if dtype != torch.float16 else 100.0
        kwargs["x"][:, empty] = 0.0
        return kwargs

    return make


def _cases() -> list[Case]:
    cases = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        size = dtype.itemsize

        def add(
            name: str, *shape: int, bench: bool = False, gpu: bool = False, _dtype: torch.dtype = dtype, **options: Any
        ) -> None:
            count = torch.Size(shape).numel()
            passes = 4 if options.get("residual") else 2
            make = _inputs(*shape, dtype=_dtype, **options)
            cases.append(Case(name, _dtype, make, passes * count * _dtype.itemsize, 4 * count, bench, gpu))

        add("llama-3.2-1b prefill 512x2048", 512, 2048, bench=True)
        add("llama-3.2-1b decode 1x2048", 1, 2048, bench=True)
        add("llama-3.2-1b prefill 512x2048 residual", 512, 2048, bench=True, residual=True)
        add("smollm2-135m prefill 512x576", 512, 576, residual=True)
        add("odd 3x7x131", 3, 7, 131)
        add("one element 4x1", 4, 1)
        add("short 2x5 residual", 2, 5, residual=True)
        add("no rows 0x64", 0, 64)
        add("strided 6x200", 6, 200, strided=True, residual=True)
        add("long 2x20011", 2, 20011)
        add("gemma 33x256", 33, 256, offset=1.0, rounding="gemma", residual=True)
        add("tiny values, eps matters 8x64", 8, 64, scale=1e-3, eps=1e-5)
        if dtype == torch.bfloat16:
            add("squares below 2^-126, no eps 8x200", 8, 200, scale=2.0**-66, eps=0.0)
            add("llama-3.1-70b prefill 4096x8192", 4096, 8192, bench=True, gpu=True)
            add("llama-3.1-70b prefill 16384x8192 residual", 16384, 8192, bench=True, gpu=True, residual=True)
        cases.append(Case("outliers 5x576", dtype, _outliers(dtype), 2 * 5 * 576 * size))
    return cases


def _cases_int8() -> list[Case]:
    cases = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):

        def add(
            name: str,
            *shape: int,
            group: int,
            bench: bool = False,
            gpu: bool = False,
            _dtype: torch.dtype = dtype,
            **options: Any,
        ) -> None:
            count, groups = torch.Size(shape).numel(), torch.Size(shape[:-1]).numel() * -(-shape[-1] // group)
            passes = 3 if options.get("residual") else 1
            moved = passes * count * _dtype.itemsize + count + 8 * groups
            make = _inputs(*shape, dtype=_dtype, int8_group=group, **options)
            cases.append(Case(name, _dtype, make, moved, 8 * count, bench, gpu))

        add("llama-3.2-1b prefill 512x2048 residual g32", 512, 2048, group=32, bench=True, residual=True)
        add("llama-3.2-1b decode 1x2048 residual g32", 1, 2048, group=32, bench=True, residual=True)
        add("llama-3.2-1b prefill 512x2048 g128", 512, 2048, group=128, bench=True)
        if dtype == torch.bfloat16:
            add("llama-3.1-70b prefill 4096x8192 residual g128", 4096, 8192, group=128, bench=True, gpu=True, residual=True)
        add("smollm2-135m 33x576 residual g64", 33, 576, group=64, residual=True)
        add("odd 3x7x131 g32", 3, 7, 131, group=32)
        add("one element 4x1 g32", 4, 1, group=32)
        add("short 2x5 residual g128", 2, 5, group=128, residual=True)
        add("no rows 0x64 g32", 0, 64, group=32)
        add("strided 6x200 residual g64", 6, 200, group=64, strided=True, residual=True)
        add("long 2x20011 g128", 2, 20011, group=128)
        add("no weight 4x160 g64", 4, 160, group=64, weight=None)
        add("gemma 33x256 residual g32", 33, 256, group=32, offset=1.0, rounding="gemma", residual=True)
        add("tiny values, eps matters 8x64 g32", 8, 64, group=32, scale=1e-3, eps=1e-5)
        moved = 5 * (576 * (dtype.itemsize + 1) + 8 * 18)
        make = _outliers(dtype, slice(100, 200), int8_group=32)
        cases.append(Case("outliers and empty groups 5x576 g32", dtype, make, moved))
    return cases


def _no_eps(x: Tensor, weight: Tensor | None, eps: float = 0.0, **options: Any) -> Any:
    return reference.rms_norm(x, weight, 0.0, **options)


def _sum_not_mean(x: Tensor, weight: Tensor | None, eps: float = 1e-6, **options: Any) -> Any:
    return reference.rms_norm(x * x.shape[-1] ** 0.5, weight, eps, **options)


def _no_residual(x: Tensor, weight: Tensor | None, eps: float = 1e-6, *, residual: Any = None, **options: Any) -> Any:
    y = reference.rms_norm(x, weight, eps, **options)
    return y if residual is None else (y, x + residual)


def _no_offset(x: Tensor, weight: Tensor | None, eps: float = 1e-6, *, offset: float = 0.0, **options: Any) -> Any:
    return reference.rms_norm(x, weight, eps, **options)


def _last_dropped(x: Tensor, weight: Tensor | None, eps: float = 1e-6, **options: Any) -> Any:
    x = x.clone()
    x[..., -1:] = 0
    return reference.rms_norm(x, weight, eps, **options)


def _without_weight(weight: Tensor | None, residual: Tensor | None = None, **inputs: Any) -> Any:
    """What the weight multiplies."""
    y = reference.rms_norm(weight=None, residual=residual, **inputs)
    return y if residual is None else y[0]


_MUTANTS = {
    "eps is ignored": _no_eps,
    "sum of squares instead of mean": _sum_not_mean,
    "residual is not added before the norm": _no_residual,
    "weight offset is ignored": _no_offset,
    "last column is dropped": _last_dropped,
}

CASES = (
    OpCases(
        op="rms_norm",
        call=rms_norm,
        reference=reference.rms_norm,
        torch=torch_rms_norm,
        rival="transformers LlamaRMSNorm",
        cases=_cases(),
        mutants=_MUTANTS,
    ),
    OpCases(
        op="rms_norm_int8",
        call=rms_norm,
        reference=never_rounded(reference.rms_norm),
        torch=rounded_by(torch_rms_norm),
        rival="transformers LlamaRMSNorm, then rounded",
        cases=_cases_int8(),
        mutants={
            **{name: rounded_by(wrong) for name, wrong in _MUTANTS.items()},
            **wrong_roundings(reference.rms_norm, _without_weight),
        },
    ),
)
