"""Tables, ids and PyTorch's own way, for tests, verify and bench."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor

from ...quant import QuantizedTensor, quantize
from .._case import Case, OpCases
from . import reference
from .api import embedding


def torch_embedding(ids: Tensor, w: QuantizedTensor | Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.nn.functional.embedding(ids.long(), w if isinstance(w, Tensor) else w.dequantize(dtype))


def _dense(inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, "w": inputs["w"].dequantize(inputs.get("dtype", torch.float32))}


def _reference(ids: Tensor, w: QuantizedTensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    return reference.embedding(ids, w, dtype=torch.float64)


def _inputs(
    n: int, k: int, bits: int, group_size: int, *ids: int, dtype: torch.dtype, symmetric: bool | None = None
) -> Callable[[Generator], dict[str, Any]]:
    def make(g: Generator) -> dict[str, Any]:
        weight = torch.randn(n, k, generator=g)
        w = quantize(weight, bits=bits, group_size=group_size, symmetric=symmetric).pack()
        return {"ids": torch.randint(n, ids, generator=g), "w": w, "dtype": dtype}

    return make


def _cases() -> list[Case]:
    cases = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):

        def add(name: str, *args: int, _dtype: torch.dtype = dtype, bench: bool = False, **options: Any) -> None:
            k, bits, count = args[1], args[2], torch.Size(args[4:]).numel()
            cost = count * k * bits // 8 + count * k * _dtype.itemsize
            cases.append(Case(name, _dtype, _inputs(*args, dtype=_dtype, **options), cost, 2 * count * k, bench))

        add("smollm2-135m prefill, int8 49152x576, 512 ids", 49152, 576, 8, 32, 512, bench=True)
        add("int4 with minimum 100x96, 3x7 ids", 100, 96, 4, 32, 3, 7)
        add("int4 symmetric 33x128, 40 ids", 33, 128, 4, 64, 40, symmetric=True)
        add("int8 whole row 19x131, 19 ids", 19, 131, 8, -1, 19)
        add("int4 whole odd row 19x37, 19 ids", 19, 37, 4, -1, 19)
        add("no ids", 17, 64, 8, 64, 0)
    return cases


def _mutant(change: Callable[[Tensor, QuantizedTensor], tuple[Tensor, QuantizedTensor]]) -> Callable[..., Tensor]:
    def call(ids: Tensor, w: QuantizedTensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        return _reference(*change(ids, w.unpack()))

    return call


CASES = OpCases(
    op="embedding",
    call=embedding,
    reference=_reference,
    torch=torch_embedding,
    rival="F.embedding on a table dequantised beforehand",
    held_by_torch=_dense,
    cases=_cases(),
    mutants={
        "the next row": _mutant(lambda ids, w: ((ids + 1) % w.shape[0], w)),
        "nibbles swapped": _mutant(lambda ids, w: (ids, replace(w, data=w.data << 4 | w.data >> 4) if w.bits == 4 else w)),
        "zero off by one": _mutant(lambda ids, w: (ids, replace(w, zero=w.zero + 1))),
        "minimum dropped": _mutant(lambda ids, w: (ids, replace(w, minimum=None))),
        "scales of the next group": _mutant(lambda ids, w: (ids, replace(w, scale=w.scale.roll(1, -1)))),
    },
)
