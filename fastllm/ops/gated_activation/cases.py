"""Shapes, inputs and PyTorch's own way, for tests, verify and bench."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .._case import Case, OpCases
from .._int8_cases import never_rounded, rounded_by, wrong_roundings
from . import reference
from .api import gated_activation


def torch_gated_activation(gate: Tensor, up: Tensor | None = None, activation: str = "silu") -> Tensor:
    """act_fn(gate) * up, as in transformers' LlamaMLP and GemmaMLP; chunked first as in Phi3MLP."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def _inputs(
    *shape: int,
    dtype: torch.dtype,
    activation: str = "silu",
    fused: bool = False,
    strided: bool = False,
    scale: float = 2.0,
    empty: slice = slice(0),
    **options: Any,
) -> Callable[[Generator], dict[str, Any]]:
    def make(g: Generator) -> dict[str, Any]:
        both = torch.randn(*shape[:-1], 2 * shape[-1], generator=g) * scale
        both[..., ::97] *= 10.0
        both[..., empty] = 0.0
        both = both.to(dtype)
        if fused:
            return {"gate": both, "activation": activation, **options}
        gate, up = both.chunk(2, -1)
        if not strided:
            gate, up = gate.contiguous(), up.contiguous()
        return {"gate": gate, "up": up, "activation": activation, **options}

    return make


def _extremes(dtype: torch.dtype, activation: str, **options: Any) -> Callable[[Generator], dict[str, Any]]:
    """Where e^-g overflows, underflows, and where g^3 does."""

    def make(g: Generator) -> dict[str, Any]:
        gate = torch.tensor([0.0, -0.0, 1e-6, -1e-6, 20.0, -20.0, 87.5, -87.5, 89.0, -89.0, 200.0, -200.0, 6e4, -6e4])
        if dtype != torch.float16:
            gate = torch.cat((gate, torch.tensor([1e15, -1e15, 3e38, -3e38, 1e-40, -1e-40])))
        gate = gate.repeat(3).to(dtype)
        return {"gate": gate, "up": torch.rand(gate.shape, generator=g).to(dtype), "activation": activation, **options}

    return make


def _cases() -> list[Case]:
    cases = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):

        def add(
            name: str, *shape: int, bench: bool = False, gpu: bool = False, _dtype: torch.dtype = dtype, **options: Any
        ) -> None:
            count = torch.Size(shape).numel()
            make = _inputs(*shape, dtype=_dtype, **options)
            cases.append(Case(name, _dtype, make, 3 * count * _dtype.itemsize, 25 * count, bench, gpu))

        add("llama-3.2-1b prefill 512x8192", 512, 8192, bench=True)
        add("llama-3.2-1b decode 1x8192", 1, 8192, bench=True)
        add("llama-3.2-1b prefill 512x8192 fused", 512, 8192, bench=True, fused=True)
        add("smollm2-135m prefill 512x1536", 512, 1536, bench=True)
        if dtype == torch.bfloat16:
            add("llama-3.1-8b prefill 4096x14336", 4096, 14336, bench=True, gpu=True)
            add("llama-3.1-8b prefill 16384x14336 fused", 16384, 14336, bench=True, gpu=True, fused=True)
        add("gelu 65x1536", 65, 1536, activation="gelu_tanh")
        add("gelu fused 3x7x131", 3, 7, 131, activation="gelu_tanh", fused=True)
        add("odd 3x7x131", 3, 7, 131)
        add("odd fused 3x7x131", 3, 7, 131, fused=True)
        add("strided 6x200", 6, 200, strided=True)
        add("strided gelu 6x37", 6, 37, strided=True, activation="gelu_pytorch_tanh")
        add("one element 4x1", 4, 1)
        add("one dim 77", 77)
        add("two pieces 2x20011", 2, 20011, fused=True)
        add("no rows 0x64", 0, 64)
        add("no columns 4x0", 4, 0)
        for activation in ("silu", "gelu_tanh"):
            cases.append(Case(f"extremes {activation}", dtype, _extremes(dtype, activation), 0, 0))
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
            moved = 2 * count * _dtype.itemsize + count + 8 * groups
            make = _inputs(*shape, dtype=_dtype, int8_group=group, **options)
            cases.append(Case(name, _dtype, make, moved, 29 * count, bench, gpu))

        add("llama-3.2-1b prefill 512x8192 fused g32", 512, 8192, group=32, bench=True, fused=True)
        add("llama-3.2-1b decode 1x8192 fused g32", 1, 8192, group=32, bench=True, fused=True)
        add("llama-3.2-1b prefill 512x8192 g128", 512, 8192, group=128, bench=True)
        if dtype == torch.bfloat16:
            add("llama-3.1-8b prefill 4096x14336 fused g128", 4096, 14336, group=128, bench=True, gpu=True, fused=True)
        add("smollm2-135m 33x1536 fused g64", 33, 1536, group=64, fused=True)
        add("gelu 17x160 g32", 17, 160, group=32, activation="gelu_tanh")
        add("gelu fused 3x7x131 g64", 3, 7, 131, group=64, activation="gelu_tanh", fused=True)
        add("odd 3x7x131 g32", 3, 7, 131, group=32)
        add("strided 6x200 g128", 6, 200, group=128, strided=True)
        add("empty groups 5x320 g32", 5, 320, group=32, empty=slice(100, 200))
        add("one element 4x1 g32", 4, 1, group=32)
        add("one dim 77 g64", 77, group=64)
        add("pieces 2x20011 fused g128", 2, 20011, group=128, fused=True)
        add("no rows 0x64 g32", 0, 64, group=32)
        add("no columns 4x0 g32", 4, 0, group=32)
        for activation in ("silu", "gelu_tanh"):
            cases.append(Case(f"extremes {activation} g32", dtype, _extremes(dtype, activation, int8_group=32), 0, 0))
    return cases


def _up_and_gate_swapped(gate: Tensor, up: Tensor | None = None, activation: str = "silu") -> Tensor:
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    return reference.gated_activation(up, gate, activation)


def _sigmoid(gate: Tensor, up: Tensor | None = None, activation: str = "silu") -> Tensor:
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    return torch.sigmoid(gate) * up


def _always(activation: str) -> Callable[..., Tensor]:
    return lambda gate, up=None, **_: reference.gated_activation(gate, up, activation)


def _erf(gate: Tensor, up: Tensor | None = None, activation: str = "silu") -> Tensor:
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    return reference.gated_activation(gate, up) if activation == "silu" else F.gelu(gate) * up


def _interleaved(gate: Tensor, up: Tensor | None = None, activation: str = "silu") -> Tensor:
    gate, up = (gate[..., ::2], gate[..., 1::2]) if up is None else (gate, up)
    return reference.gated_activation(gate, up, activation)


def _not_multiplied(gate: Tensor, up: Tensor | None = None, activation: str = "silu") -> Tensor:
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    return reference.gated_activation(gate, torch.ones_like(up), activation)


def _last_dropped(gate: Tensor, up: Tensor | None = None, activation: str = "silu") -> Tensor:
    y = reference.gated_activation(gate, up, activation)
    y[..., -1:] = 0
    return y


_MUTANTS = {
    "up and gate are swapped": _up_and_gate_swapped,
    "sigmoid instead of silu": _sigmoid,
    "gelu instead of silu": _always("gelu_tanh"),
    "silu instead of gelu": _always("silu"),
    "gelu by erf instead of tanh": _erf,
    "the fused buffer is read as interleaved": _interleaved,
    "up does not multiply": _not_multiplied,
    "last column is dropped": _last_dropped,
}

CASES = (
    OpCases(
        op="gated_activation",
        call=gated_activation,
        reference=reference.gated_activation,
        torch=torch_gated_activation,
        rival="transformers LlamaMLP's act_fn(gate) * up",
        cases=_cases(),
        mutants=_MUTANTS,
    ),
    OpCases(
        op="gated_activation_int8",
        call=gated_activation,
        reference=never_rounded(reference.gated_activation),
        torch=rounded_by(torch_gated_activation),
        rival="transformers LlamaMLP's act_fn(gate) * up, then rounded",
        cases=_cases_int8(),
        mutants={
            # gelu's two forms differ by less than a step of int8
            **{name: rounded_by(wrong) for name, wrong in _MUTANTS.items() if wrong is not _erf},
            **wrong_roundings(reference.gated_activation, _not_multiplied),
        },
    ),
)
