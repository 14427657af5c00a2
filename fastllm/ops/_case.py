"""What an op's ``cases.py`` is made of. Tests, ``verify`` and ``bench`` are driven by it and know no op by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Case", "OpCases"]


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Args:
        name: says the shape and what is special; unique for its op and dtype.
        dtype: the working dtype.
        inputs: takes a seeded CPU generator, returns the public function's keyword arguments, on the CPU.
        bytes: bytes that the op cannot avoid moving (inputs read once, outputs written once).
        flops: floating-point or integer operations that it cannot avoid.
        arithmetic: which measured peak bounds them: "fp32", "int8" (byte dot products), "int4" (bytes by 4 bits) or "bf16" (bf16 dot products).
        bench: whether ``fastllm bench`` runs it; its shape then carries a model's name.
        gpu: a shape of the size that GPUs are for, which no CPU test should wait for: ``bench`` runs it where there is a GPU.
        by_torch: what part of the work is done by PyTorch's own kernels, whose bits may depend on the number of threads; a row of
            ``bench`` says it.
        factor: replaces the 2 of the tolerance rule; ``because`` then says why.
    """

    name: str
    dtype: torch.dtype
    inputs: Callable[[torch.Generator], dict[str, Any]]
    bytes: int = 0
    flops: int = 0
    bench: bool = False
    gpu: bool = False
    factor: float = 2.0
    because: str = ""
    arithmetic: str = "fp32"
    by_torch: str = ""


@dataclass(frozen=True)
class OpCases:
    """An op's public function beside its float64 reference and PyTorch's own way, all with the same keyword arguments.

    Args:
        op: the op's name, as ``fastllm.ops`` spells it.
        call: the public function.
        reference: plain PyTorch; given float64 inputs, it computes in float64.
        torch: what a PyTorch user would write, in the working dtype.
        cases: the calls; those for GPUs alone are taken out of them into ``gpu_cases``.
        compute_bound: whether ``bench`` compares with the arithmetic peak rather than with bandwidth, per case.
        rival: the name of PyTorch's own way, for tables.
        held_by_torch: what a PyTorch user would hold in place of the arguments (a dequantised weight): ``bench`` makes it
            before the clock starts, and ``torch`` takes it too.
        mutants: wrong variants of the reference, by name; each must fail the tolerance rule on at least one case.
    """

    op: str
    call: Callable[..., Any]
    reference: Callable[..., Any]
    torch: Callable[..., Any]
    cases: Sequence[Case]
    rival: str = "torch"
    held_by_torch: Callable[[dict[str, Any]], dict[str, Any]] = lambda inputs: inputs
    compute_bound: Callable[[Case], bool] = lambda case: False
    mutants: dict[str, Callable[..., Any]] = field(default_factory=dict)
    gpu_cases: Sequence[Case] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "gpu_cases", tuple(case for case in self.cases if case.gpu))
        object.__setattr__(self, "cases", tuple(case for case in self.cases if not case.gpu))
