"""The rows of ``fastllm bench``: an op's speed at a model's shape, beside its rivals and the machine's limits.

A row carries the verdict of the tolerance rule at that very shape; a row that is not right has no speed.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends import cpu_module, info
from ..errors import value_error
from ..ops._case import Case, OpCases
from ..ops._explain import ops_reached, rung_of
from .limits import Limits, caches, gpu_limits, limits
from .others import others
from .report import number
from .timing import Timing, in_turns, in_turns_on_gpu, ratio
from .verify import (
    case_inputs,
    clone,
    copied,
    device_of,
    dtype_name,
    expected,
    forced,
    results,
    run_case,
    runs_here,
    to_device,
)

__all__ = ["COLUMNS", "RIVALS", "Row", "bench_case", "checked_rivals", "commit", "sorted_rows", "tables"]

RIVALS = ("torch", "compile", "others")
MAX_SETS, MAX_SET_BYTES = 20_000, 1 << 30  # of arguments, for a cold row
_MEASURED = (
    *("median_us", "p20_us", "p80_us", "host_us", "rate", "limit", "pct_of_limit"),
    *("torch_us", "compile_us", "others_us", "vs_torch", "vs_best"),
)


@dataclass(frozen=True)
class Row:
    """One line of a benchmark. Microseconds a call; None where there is nothing to say, and ``note`` then says why."""

    op: str
    backend: str
    isa: str  # the rung, or sm_90
    dtype: str
    shape: str  # the case's name
    threads: int
    cache: str  # "warm" or "cold"
    median_us: float | None
    p20_us: float | None
    p80_us: float | None
    host_us: float | None  # a whole call on the op's smallest case: Python, checks, allocation, the boundary
    rate: float | None
    unit: str  # "GB/s", or "GFLOP/s" where arithmetic bounds the case
    limit: float | None
    limited_by: str  # "copy l2", "read memory", "fp32", ...
    pct_of_limit: float | None
    rival: str  # what torch_us timed
    torch_us: float | None
    compile_us: float | None
    others_us: dict[str, float] | None  # by name
    vs_torch: float | None  # above 1: ours is faster
    vs_best: float | None
    ok: bool
    error: float
    torch_error: float
    note: str
    device: str
    torch: str
    commit: str | None
    date: str

    def as_dict(self) -> dict[str, Any]:
        """A row of ``fastllm bench --json``."""
        return asdict(self)


@functools.cache
def commit() -> str | None:
    """The commit of the checkout that this package runs from, with a + where it has changes; None outside of a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def checked_rivals(names: Sequence[str]) -> tuple[str, ...]:
    """The names, of RIVALS. Raises ValueError for another."""
    for name in names:
        if name not in RIVALS:
            raise value_error("bench", "--rivals", name, "torch, compile, others, or some of them: torch,compile")
    return tuple(names)


def bench_case(
    spec: OpCases,
    case: Case,
    *,
    backends: Sequence[str] | None = None,
    isas: Sequence[str] = (),
    threads: Sequence[int] = (),
    rivals: Sequence[str] = ("torch", "compile"),
    cold: bool = False,
    seconds: float = 0.6,
) -> list[Row]:
    """The rows of one case: each backend (default: those that this machine can run, but the reference), rung, number of threads, warm and if asked cold.

    Args:
        isas: the CPU's rungs; default: the one in force.
        threads: default: PyTorch's number.
        rivals: what runs in turns with ours: "torch", the case's plain PyTorch, "compile", the same under torch.compile, and
            "others", other libraries' kernels and PyTorch's single ones (``measure/others.py``).
        cold: also rows whose arguments come from memory.
        seconds: the budget of a row.
    """
    before = torch.get_num_threads()
    names = dict.fromkeys(b.name for op, _ in ops_reached(spec.call, (), expected(spec, case).inputs) for b in op.backends)
    rows: list[Row] = []
    try:
        for count in threads or (before,):
            torch.set_num_threads(count)
            for backend in names:
                if case.gpu and device_of(backend) != "cuda":
                    continue
                if backend in backends if backends else runs_here(backend):
                    for isa in (isas or ("",)) if backend == "cpu" else ("",):
                        rows += _rows(spec, case, backend, isa, rivals, cold, seconds)
    finally:
        torch.set_num_threads(before)
    return rows


def _rows(spec: OpCases, case: Case, backend: str, isa: str, rivals: Sequence[str], cold: bool, seconds: float) -> list[Row]:
    """Warm, and if asked cold. A list, not a generator: the forced backend must not be seen by whoever takes the rows."""
    threads, device = torch.get_num_threads(), device_of(backend)
    inputs = to_device(expected(spec, case).inputs, device)
    held = spec.held_by_torch(inputs)
    with forced(backend, isa or None), torch.no_grad():
        blank = Row(
            op=spec.op,
            backend=backend,
            isa=_isa(spec, inputs, backend),
            dtype=dtype_name(case.dtype),
            shape=case.name,
            threads=threads,
            cache="warm",
            **dict.fromkeys(_MEASURED),
            unit="",
            limited_by="",
            rival=spec.rival,
            ok=False,
            error=math.nan,
            torch_error=math.nan,
            note="",
            device=torch.cuda.get_device_name() if device == "cuda" else info()["processor"],
            torch=torch.__version__,
            commit=commit(),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        try:
            verdict = run_case(spec, case, device=device)
        except NotImplementedError as error:  # this backend does not serve the shape
            return [replace(blank, note=str(error))]
        blank = replace(blank, ok=verdict.ok, error=verdict.error, torch_error=verdict.torch_error, note=verdict.why)
        if not verdict.ok:
            return [blank]
        calls: dict[str, Callable[..., Any]] = {"ours": spec.call}
        if "torch" in rivals:
            calls["torch"] = spec.torch
        notes = []
        holds: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"ours": lambda own: own}
        for name, other in others(spec.op, device).items() if "others" in rivals else ():
            hold = other.held or spec.held_by_torch
            try:
                other.call(**hold(inputs))
                calls[name], holds[name] = other.call, hold
            except Exception as error:  # of another library, whatever it is: the row says so
                notes.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
        if "compile" in rivals:
            compiled, why = _compiled(spec, held)
            notes.append(why)
            if compiled is not None:
                calls["compile"] = compiled
        written = sum(y.nbytes for y in results(spec.call(**copied(inputs))))
        host = _host_us(spec, case, device)
        rows = []
        for is_cold in (False, True) if cold else (False,):
            sets = _cold(inputs, case.bytes, _last_level(device)) if is_cold else [inputs]
            if not sets:
                rows.append(replace(blank, cache="cold", note="cold: more copies of the arguments than memory should hold"))
                continue
            own = {name: [holds.get(name, spec.held_by_torch)(one) for one in sets] for name in calls}
            if device == "cuda":
                times, uncaptured = in_turns_on_gpu(calls, own, cold=is_cold, seconds=seconds)
                share, host_us = _gpu_share(case, times["ours"]), host
            else:
                times, uncaptured = in_turns(calls, own, cold=is_cold, seconds=seconds), ""
                share, host_us = _share(spec, case, times["ours"], written, is_cold), min(host, times["ours"].median * 1e6)
            note = "; ".join(filter(None, (case.by_torch, *notes, uncaptured)))
            row = replace(blank, cache="cold" if is_cold else "warm", note=note, host_us=host_us)
            rows.append(replace(row, **_speeds(times), **share))
        return rows


def _isa(spec: OpCases, inputs: dict[str, Any], backend: str) -> str:
    if backend == "cpu":
        return " or ".join(dict.fromkeys(rung_of(op.name) for op, _ in ops_reached(spec.call, (), inputs)))
    return "sm_{}{}".format(*torch.cuda.get_device_capability()) if device_of(backend) == "cuda" else ""


def _compiled(spec: OpCases, inputs: dict[str, Any]) -> tuple[Callable[..., Any] | None, str]:
    """The case's plain PyTorch under torch.compile, compiled for these arguments; or None and why not."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        return None, "torch.compile: no C++ compiler is installed"
    torch.compiler.reset()  # or the eighth shape of an op would be refused for recompiling too often
    compiled = torch.compile(spec.torch, dynamic=False)
    try:
        compiled(**inputs)
    except Exception as error:
        return None, f"torch.compile: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return compiled, ""


def _host_us(spec: OpCases, case: Case, device: str) -> float:
    """A call on the op's smallest case of the same dtype: what is left when the kernel has next to nothing to do."""
    alike = [c for c in spec.cases if c.dtype == case.dtype and c.bytes > 0]
    smallest = min(alike or [case], key=lambda c: (c.bytes, c.flops))
    inputs = to_device(case_inputs(spec, smallest), device)
    try:
        return in_turns({"ours": spec.call}, [inputs], seconds=0.02, warmup=0.01)["ours"].median * 1e6
    except NotImplementedError:  # the backend serves this case, but not the smallest one
        return math.nan


def _last_level(device: str) -> int:
    return torch.cuda.get_device_properties().L2_cache_size if device == "cuda" else caches().l3


def _cold(inputs: dict[str, Any], touched: int, last_level: int) -> list[dict[str, Any]]:
    """Copies of the arguments that fill the last-level cache twice, so that each has left it when its turn comes again.

    None at all where a call touches so little of what it holds (one token's place in a cache) that they would need too much
    memory. (Pushing everything out of the caches before a call instead would make Python cold too, and time that.)
    """
    count = max(2, math.ceil(2 * last_level / max(touched, 1)))
    held = sum(v.nbytes for v in inputs.values() if hasattr(v, "nbytes"))
    if count > MAX_SETS or count * held > MAX_SET_BYTES:
        return []
    return [inputs, *(_deep(inputs) for _ in range(count - 1))]


def _deep(inputs: dict[str, Any]) -> dict[str, Any]:
    """Quantised weights are copied too, with what they keep packed."""
    return {k: clone(v) if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in inputs.items()}


def _speeds(times: Mapping[str, Timing]) -> dict[str, Any]:
    ours, torchs, compiled = times["ours"], times.get("torch"), times.get("compile")
    rivals = [timing for name, timing in times.items() if name != "ours"]
    return {
        "median_us": ours.median * 1e6,
        "p20_us": ours.p20 * 1e6,
        "p80_us": ours.p80 * 1e6,
        "torch_us": torchs and torchs.median * 1e6,
        "compile_us": compiled and compiled.median * 1e6,
        "others_us": {n: t.median * 1e6 for n, t in times.items() if n not in ("ours", "torch", "compile")} or None,
        "vs_torch": torchs and ratio(torchs, ours),
        "vs_best": min((ratio(rival, ours) for rival in rivals), default=None),
    }


def _share(spec: OpCases, case: Case, ours: Timing, written: int, cold: bool) -> dict[str, Any]:
    """The rate, and what part of the machine's limit it is: the shortest possible time over ours."""
    isa, threads = cpu_module().active_isa(), torch.get_num_threads()  # type: ignore[union-attr]
    share = _share_of(measured_limits(isa, threads), spec, case, ours, written, cold)
    for _ in range(3):
        if share.get("pct_of_limit", 0.0) <= 100:
            break
        # Nothing beats a limit: others had the machine when it was measured. The best of several is nearer to the truth.
        _best[isa, threads] = measured_limits(isa, threads).better(limits(isa, threads, fresh=True))
        share = _share_of(_best[isa, threads], spec, case, ours, written, cold)
    return share


def _gpu_share(case: Case, ours: Timing) -> dict[str, Any]:
    """The longer of what the bytes and the operations take at this GPU's measured limits, over our time."""
    here = gpu_limits()
    arithmetic = "int8" if case.arithmetic.startswith("int") else "fp32" if case.dtype == torch.float32 else "bf16"
    moving, computing = case.bytes / here.copy / 1e9, case.flops / here.peak(arithmetic)
    by_bytes = moving >= computing
    work, shortest = (case.bytes, moving) if by_bytes else (case.flops, computing)
    if not work:
        return {}
    return {
        "rate": work / ours.median / 1e9,
        "unit": "GB/s" if by_bytes else "GFLOP/s",
        "limit": work / shortest / 1e9,
        "limited_by": "copy" if by_bytes else f"{arithmetic} product",
        "pct_of_limit": 100 * shortest / ours.median,
    }


def _share_of(here: Limits, spec: OpCases, case: Case, ours: Timing, written: int, cold: bool) -> dict[str, Any]:
    if spec.compute_bound(case):
        work, unit = case.flops, "GOP/s" if case.arithmetic.startswith("int") else "GFLOP/s"
        shortest, name = case.flops / here.peak(case.arithmetic), case.arithmetic
    else:
        shortest, name = here.transfer(case.bytes, written, cold)
        work, unit = case.bytes, "GB/s"
    if not work or not shortest:
        return {}
    return {
        "rate": work / ours.median / 1e9,
        "unit": unit,
        "limit": work / shortest / 1e9,
        "limited_by": name,
        "pct_of_limit": 100 * shortest / ours.median,
    }


_best: dict[tuple[str, int], Limits] = {}


def measured_limits(isa: str, threads: int) -> Limits:
    """Measured in this very run: a limit of another day says little about a share of today's."""
    if (isa, threads) not in _best:
        _best[isa, threads] = limits(isa, threads, fresh=True)
    return _best[isa, threads]


# ---------------------------------------------------------------- the tables

COLUMNS = (
    "shape",
    "dtype",
    "on",
    "us",
    "p20-p80",
    "host",
    "rate",
    "of limit",
    "torch",
    "compile",
    "vs torch",
    "vs best",
    "right",
)


def tables(rows: Sequence[Row]) -> dict[str, list[list[Any]]]:
    """For each op, by a title, the cells under COLUMNS, sorted; all rows, those that lose too."""
    grouped: dict[str, list[list[Any]]] = {}
    for row in sorted_rows(rows):
        where = [row.backend, row.isa, f"{row.threads} thread{'s' if row.threads > 1 else ''}", row.cache]
        cells = [
            *(row.shape, row.dtype, " ".join(filter(None, where))),
            row.median_us,
            f"{number(row.p20_us)}-{number(row.p80_us)}" if row.median_us else None,
            row.host_us,
            f"{number(row.rate)} {row.unit}" if row.rate else None,
            f"{row.pct_of_limit:.0f}% {row.limited_by}" if row.pct_of_limit else None,
            *(row.torch_us, row.compile_us),
            *(f"{times:.2f}x" if times else None for times in (row.vs_torch, row.vs_best)),
            "yes" if row.ok else "NO",
        ]
        grouped.setdefault(f"{row.op}, microseconds a call; torch is {row.rival}", []).append(cells)
    return grouped


def sorted_rows(rows: Sequence[Row]) -> list[Row]:
    """By op, shape, dtype, backend, rung, threads, warm before cold."""
    return sorted(rows, key=lambda r: (r.op, r.shape, r.dtype, r.backend, r.isa, r.threads, r.cache != "warm"))
