"""Runs an op's cases against float64, on any backend and rung: what ``fastllm verify`` and ``tests/test_ops.py`` share."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends import use_backend, use_isa
from ..ops._case import Case, OpCases
from .check import Verdict, check

__all__ = ["all_cases", "case_inputs", "results", "run_case", "to_float64"]


def all_cases() -> dict[str, OpCases]:
    """Every op's cases, found by folder: an op that has a ``cases.py`` is tested, verified and benchmarked."""
    found = {}
    for module in pkgutil.iter_modules(ops.__path__):
        if module.ispkg:
            with contextlib.suppress(ModuleNotFoundError):
                cases = importlib.import_module(f"{ops.__name__}.{module.name}.cases").CASES
                for spec in cases if isinstance(cases, tuple) else (cases,):  # a folder may hold two ops of one kernel
                    found[spec.op] = spec
    return found


def case_inputs(spec: OpCases, case: Case) -> dict[str, Any]:
    """The case's keyword arguments, the same ones in every process."""
    seed = zlib.crc32(f"{spec.op}/{case.name}/{case.dtype}".encode())
    return case.inputs(torch.Generator().manual_seed(seed))


def to_float64(value: Any) -> Any:
    """Floating-point tensors widened, exactly; everything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def results(value: Any) -> tuple[Tensor, ...]:
    """An op's result or results, as a tuple."""
    return value if isinstance(value, tuple) else (value,)


def run_case(spec: OpCases, case: Case, call: Callable[..., Any] | None = None) -> Verdict:
    """Hold ``call`` (default: the public function, on whatever backend and rung are in force) to the tolerance rule.

    Returns the first verdict that is not ok, else the one with the largest error.
    """
    inputs = case_inputs(spec, case)
    with torch.no_grad():
        got = results((call or spec.call)(**_copied(inputs)))
        expected = results(spec.reference(**{k: to_float64(v) for k, v in _copied(inputs).items()}))
        theirs = results(spec.torch(**_copied(inputs)))
    verdicts = [check(y, r, p, factor=case.factor) for y, r, p in zip(got, expected, theirs, strict=True)]
    return next((v for v in verdicts if not v.ok), max(verdicts, key=lambda v: v.error))


def _copied(inputs: dict[str, Any]) -> dict[str, Any]:
    """Ops that write into an argument (a cache) must not see another's writes; strides are kept."""
    return {k: _clone(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _clone(t: Tensor) -> Tensor:
    span = sum((n - 1) * s for n, s in zip(t.shape, t.stride())) + 1 if t.numel() else 0
    flat = t.as_strided((span,), (1,)).clone() if span else t.clone().flatten()
    return flat.as_strided(t.shape, t.stride()) if span else t.clone()


@contextlib.contextmanager
def forced(backend: str, isa: str | None = None) -> Iterator[None]:
    """One backend, and for the CPU one rung."""
    with use_backend(backend), use_isa(isa) if isa else contextlib.nullcontext():
        yield
