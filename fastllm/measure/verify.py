"""Runs ops' cases against float64, on any backend and rung: what ``fastllm verify`` and ``tests/test_ops.py`` share."""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
import shlex
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends import cuda_executor, isa_names, use_backend, use_isa
from ..errors import value_error
from ..ops._case import Case, OpCases
from ..ops._explain import ops_reached
from ..ops._triton import interpreting
from ..quant.activations import Int8Activations
from .check import Verdict, check
from .poison import poisoned

__all__ = [
    "Expected",
    "Mutant",
    "Result",
    "all_cases",
    "case_inputs",
    "checked_isas",
    "clone",
    "copied",
    "device_of",
    "dtype_name",
    "expected",
    "forced",
    "mutants",
    "refusal",
    "results",
    "run_case",
    "runs_here",
    "select_cases",
    "simulated",
    "to_device",
    "to_float64",
    "too_slow",
    "values",
    "verify_case",
]

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# The scalar rung does about 1 GFLOP/s: more than this takes it longer than all other rungs of an op together.
SCALAR_FLOPS = 500_000_000


GPU_BACKENDS = ("cuda", "triton", "torch")

# Without a GPU: Triton's interpreter computes with numpy, one program after the other, the executor of CUDA kernels (tests/simt)
# one thread after the other; some 10 MFLOP/s both.
SIMULATED_FLOPS, SIMULATED_BYTES = 5_000_000, 500_000


def too_slow(case: Case, isa: str | None, backend: str = "cpu") -> str:
    """The one rule by which tests and ``verify`` leave a case out: a large one on the scalar rung or in an interpreter.

    Returns the reason, or "" for a case that is run.
    """
    if case.gpu:
        return "" if device_of(backend) == "cuda" else "a shape for GPUs"
    if backend in GPU_BACKENDS and simulated(backend):
        if case.flops > SIMULATED_FLOPS or case.bytes > SIMULATED_BYTES:
            where = "the executor of CUDA kernels" if backend == "cuda" else "Triton's interpreter"
            return f"{case.flops / 1e6:.0f} MFLOP and {case.bytes / 1e6:.0f} MB in {where}: --slow runs it"
    elif isa == "scalar" and case.flops > SCALAR_FLOPS:
        return f"{case.flops / 1e9:.1f} GFLOP on the scalar rung: --slow runs it"
    return ""


# ---------------------------------------------------------------- cases


@functools.cache
def all_cases() -> dict[str, OpCases]:
    """Every op's cases, found by folder: an op that has a ``cases.py`` is tested, verified and benchmarked."""
    found = {}
    for module in pkgutil.iter_modules(ops.__path__):
        if module.ispkg:
            name = f"{ops.__name__}.{module.name}.cases"
            try:
                cases = importlib.import_module(name).CASES
            except ModuleNotFoundError as error:
                if error.name != name:  # the folder has cases, and they need something that is missing
                    raise
                continue
            for spec in cases if isinstance(cases, tuple) else (cases,):  # a folder may hold two ops of one kernel
                found[spec.op] = spec
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """ "bf16" rather than "torch.bfloat16"."""
    return next((short for short, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


def select_cases(
    command: str,
    op: Sequence[str] | None = None,
    dtype: Sequence[str] | None = None,
    case: str | None = None,
    only_bench: bool = False,
) -> list[tuple[OpCases, Case]]:
    """The cases that a command line names; ``case`` is a case's whole name or, failing that, a part of some.

    Raises: ValueError that lists what there is, for a name that fits nothing.
    """
    specs = all_cases()
    for name in op or ():
        if name not in specs:
            raise value_error(command, "--op", name, "one of " + ", ".join(specs))
    for name in dtype or ():
        if name not in DTYPES:
            raise value_error(command, "--dtype", name, "one of fp32, bf16, fp16")
    wanted = [spec for spec in specs.values() if op is None or spec.op in op]
    with_gpu = torch.cuda.is_available()
    chosen = [(spec, c) for spec in wanted for c in (*spec.cases, *(spec.gpu_cases if with_gpu else ()))]
    if case is not None:
        named = [(s, c) for s, c in chosen if c.name == case] or [(s, c) for s, c in chosen if case in c.name]
        if not named:
            names = dict.fromkeys(c.name for _, c in chosen)
            raise value_error(command, "--case", case, "a case's name or a part of it: " + "; ".join(names))
        chosen = named
    elif only_bench:
        chosen = [(s, c) for s, c in chosen if c.bench]
    return [(s, c) for s, c in chosen if dtype is None or c.dtype in {DTYPES[name] for name in dtype}]


def case_inputs(spec: OpCases, case: Case) -> dict[str, Any]:
    """The case's keyword arguments, the same ones in every process."""
    seed = zlib.crc32(f"{spec.op}/{case.name}/{case.dtype}".encode())
    return case.inputs(torch.Generator().manual_seed(seed))


def to_float64(value: Any) -> Any:
    """Floating-point tensors widened, exactly, and what is computed of int8 activations; everything else as it is."""
    if isinstance(value, Int8Activations):
        return replace(value, dtype=torch.float64)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def to_device(inputs: dict[str, Any], device: str) -> dict[str, Any]:
    """Tensors, and whatever else knows how (a quantised weight), on another device."""
    return {k: v.to(device) if hasattr(v, "to") else v for k, v in inputs.items()} if device != "cpu" else inputs


def results(value: Any) -> tuple[Tensor, ...]:
    """An op's result or results as a tuple of tensors: of int8 activations integers and groups."""
    parts = value if isinstance(value, tuple) else (value,)
    return tuple(t for part in parts for t in ((part.data, part.groups) if isinstance(part, Int8Activations) else (part,)))


def values(value: Any) -> tuple[Tensor, ...]:
    """What the tolerance rule is held to: the results, and what int8 activations stand for, in fp32."""
    parts = value if isinstance(value, tuple) else (value,)
    return tuple(part.dequantize(torch.float32) if isinstance(part, Int8Activations) else part for part in parts)


def copied(inputs: dict[str, Any]) -> dict[str, Any]:
    """Ops that write into an argument (a cache) must not see another's writes; strides are kept."""
    return {k: clone(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def clone(t: Tensor) -> Tensor:
    """A copy with the same strides, where ``Tensor.clone`` may choose others."""
    span = sum((n - 1) * s for n, s in zip(t.shape, t.stride())) + 1 if t.numel() else 0
    flat = t.as_strided((span,), (1,)).clone() if span else t.clone().flatten()
    return flat.as_strided(t.shape, t.stride()) if span else t.clone()


# ---------------------------------------------------------------- one case


@dataclass(frozen=True)
class Expected:
    """A case's inputs, the float64 reference's results and PyTorch's own in the working dtype."""

    inputs: dict[str, Any]
    reference: tuple[Tensor, ...]
    torch: tuple[Tensor, ...]


_expected: dict[tuple[str, str, torch.dtype], Expected] = {}


def expected(spec: OpCases, case: Case) -> Expected:
    """The case's reference, computed once for all backends and rungs that run it in a row: the last few are kept."""
    key = (spec.op, case.name, case.dtype)
    if key not in _expected:
        inputs = to_device(case_inputs(spec, case), "cuda" if case.gpu else "cpu")
        with torch.no_grad():
            reference = values(spec.reference(**{k: to_float64(v) for k, v in copied(inputs).items()}))
            theirs = values(spec.torch(**copied(inputs)))
        while len(_expected) >= 4:
            del _expected[next(iter(_expected))]
        _expected[key] = Expected(inputs, reference, theirs)
    return _expected[key]


def run_case(spec: OpCases, case: Case, call: Callable[..., Any] | None = None, device: str = "cpu") -> Verdict:
    """Hold ``call`` (default: the public function, on whatever backend and rung are in force) to the tolerance rule.

    Returns the first verdict that is not ok, else the one with the largest share of its bound.
    """
    known = expected(spec, case)
    with torch.no_grad():
        got = values((call or spec.call)(**to_device(copied(known.inputs), device)))
    if len(got) != len(known.reference):
        return Verdict.failed(f"{len(got)} results, expected {len(known.reference)}")
    verdicts = [check(y.to(r.device), r, p, factor=case.factor) for y, r, p in zip(got, known.reference, known.torch)]
    return next((v for v in verdicts if not v.ok), max(verdicts, key=lambda v: v.share))


@contextlib.contextmanager
def forced(backend: str, isa: str | None = None) -> Iterator[None]:
    """One backend, and for the CPU one rung."""
    with use_backend(backend), use_isa(isa) if isa else contextlib.nullcontext():
        yield


def refusal(spec: OpCases, inputs: dict[str, Any], backend: str) -> str | None:
    """Why a backend does not serve these arguments, or None if it does."""
    for op, prepared in ops_reached(spec.call, (), inputs):
        own = [b for b in op.backends if b.name == backend]
        reason = own[0].refuse(*prepared) if own else f"{op.name} has no such backend"
        if reason is not None:
            return reason
    return None


# ---------------------------------------------------------------- fastllm verify


@dataclass(frozen=True)
class Result:
    """What ``fastllm verify`` says of one case on one backend and rung; ``ok`` is None where it was left out."""

    op: str
    backend: str
    isa: str
    dtype: str
    case: str
    ok: bool | None
    error: float
    torch_error: float
    bound: float
    share: float
    nmse: float
    torch_nmse: float
    factor: float
    seconds: float
    why: str

    @property
    def command(self) -> str:
        """What repeats exactly this."""
        words = ["fastllm", "verify", "--op", self.op, "--backend", self.backend]
        words += ["--isa", self.isa] if self.isa else []
        return shlex.join([*words, "--dtype", self.dtype, "--case", self.case])

    def as_dict(self) -> dict[str, Any]:
        """A row of ``fastllm verify --json``."""
        return {**asdict(self), "command": self.command}


def device_of(backend: str) -> str:
    """Where a backend's tensors live."""
    return "cuda" if backend in GPU_BACKENDS and torch.cuda.is_available() else "cpu"


def simulated(backend: str) -> bool:
    """Whether a GPU backend runs on this CPU: in Triton's interpreter, or compiled for the executor in tests/simt."""
    return cuda_executor() if backend == "cuda" else interpreting()


def runs_here(backend: str) -> bool:
    """Whether this machine has anything for the backend to run on: what is left out where no backend is named. ("torch" is a
    product of PyTorch's behind a Triton kernel.)"""
    if backend in GPU_BACKENDS:
        return torch.cuda.is_available() or simulated(backend)
    return backend != "reference"


def checked_isas(command: str, isa: Sequence[str] | None) -> tuple[str, ...]:
    """The rungs that a command line names, or all of this machine's. Raises ValueError for one that it lacks."""
    rungs = isa_names()
    for name in isa or ():
        if name not in rungs:
            raise value_error(command, "--isa", name, "one of " + ", ".join(rungs), "which this machine can run")
    return tuple(isa) if isa else rungs


def verify_case(
    spec: OpCases, case: Case, backends: Sequence[str] | None, isas: Sequence[str], slow: bool = False
) -> Iterator[Result]:
    """One case on every backend that its op has and this machine can run, or on the named ones, and on every rung."""
    inputs = case_inputs(spec, case)  # the references are computed where the case is run
    names = dict.fromkeys(b.name for op, _ in ops_reached(spec.call, (), inputs) for b in op.backends)
    for name in names:
        if name in backends if backends else runs_here(name):
            with use_backend(name):  # where one is forced, a backend does not leave calls to faster ones
                reason = refusal(spec, to_device(inputs, device_of(name)), name)
            # Without the compiled module, one row says so.
            for isa in isas if name == "cpu" and isas else ("",):
                if reason is None and not slow and (late := too_slow(case, isa, name)):
                    yield _result(spec, case, name, isa, None, Verdict.failed(late), 0.0)
                elif reason is not None:
                    yield _result(spec, case, name, isa, None, Verdict.failed(reason), 0.0)
                else:
                    yield _run(spec, case, name, isa)


def _run(spec: OpCases, case: Case, backend: str, isa: str) -> Result:
    """Outputs are poisoned and guarded; an exception is a failure of this case, not the end of all."""
    start = time.perf_counter()
    try:
        with forced(backend, isa), poisoned() as memory:
            verdict = run_case(spec, case, device=device_of(backend))
            overrun = memory.overrun()
        if overrun:
            verdict = replace(verdict, ok=False, why=f"{verdict.why}; {overrun}" if verdict.why else overrun)
    except Exception as error:
        verdict = Verdict.failed(f"{type(error).__name__}: {error}")
    return _result(spec, case, backend, isa, verdict.ok, verdict, time.perf_counter() - start)


def _result(spec: OpCases, case: Case, backend: str, isa: str, ok: bool | None, verdict: Verdict, seconds: float) -> Result:
    return Result(
        op=spec.op,
        backend=backend,
        isa=isa,
        dtype=dtype_name(case.dtype),
        case=case.name,
        ok=ok,
        error=verdict.error,
        torch_error=verdict.torch_error,
        bound=verdict.bound,
        share=verdict.share,
        nmse=verdict.nmse,
        torch_nmse=verdict.torch_nmse,
        factor=case.factor,
        seconds=seconds,
        why=verdict.why,
    )


# ---------------------------------------------------------------- mutants: the test of the test


@dataclass(frozen=True)
class Mutant:
    """A wrong variant of an op's reference, and the first case on which the rule caught it (empty: none did)."""

    op: str
    mutant: str
    case: str
    dtype: str
    why: str


@functools.cache
def mutants(op: str) -> tuple[Mutant, ...]:
    """Runs an op's mutants, in float64 and rounded once, on its cases until each is caught, cheap cases first."""
    spec = all_cases()[op]
    caught: dict[str, Mutant] = {}
    for case in sorted(spec.cases, key=lambda c: (c.flops, c.bytes)):
        for name, wrong in spec.mutants.items():
            if name in caught:
                continue
            verdict = run_case(spec, case, functools.partial(_rounded, wrong, expected(spec, case)))
            if not verdict.ok:
                caught[name] = Mutant(op, name, case.name, dtype_name(case.dtype), verdict.why)
        if len(caught) == len(spec.mutants):
            break
    return tuple(caught.get(name, Mutant(op, name, "", "", "no case notices")) for name in spec.mutants)


def _rounded(wrong: Callable[..., Any], known: Expected, **inputs: Any) -> tuple[Tensor, ...]:
    got = values(wrong(**{k: to_float64(v) for k, v in inputs.items()}))
    return tuple(y.to(p.dtype) if y.is_floating_point() else y for y, p in zip(got, known.torch))
