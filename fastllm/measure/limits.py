"""What this machine can do at most, measured here: read and copy bandwidth a cache level, and the arithmetic peaks.

The loops are compiled (csrc/cpu/limits.cpp), once a rung. Each figure is the best of several runs, because a limit is what
nothing disturbed. Copy counts its bytes twice: read and written; to memory it stores past the caches.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..backends import cpu_module, info, use_isa
from ..errors import value_error
from ..pages import HugePages
from .report import write_json

__all__ = ["Caches", "GpuLimits", "Limits", "cache_file", "caches", "gpu_limits", "limits", "limits_now", "round_trip"]


# ---------------------------------------------------------------- the machine's caches


@dataclass(frozen=True)
class Caches:
    """Bytes of a core's own L2 and of the last level, which cores share."""

    l2: int
    l3: int


def caches() -> Caches:
    """As Linux reports them; 1 MiB and 32 MiB where nothing does."""
    sizes: dict[int, int] = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        with contextlib.suppress(OSError, ValueError):
            if (index / "type").read_text().strip() != "Instruction":
                sizes[int((index / "level").read_text())] = _bytes((index / "size").read_text().strip())
    l2 = sizes.get(2, 1 << 20)
    return Caches(l2, max(sizes.get(3, 32 << 20 if not sizes else l2), l2))


def _bytes(text: str) -> int:
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
    return int(text[:-1]) * unit if unit > 1 else int(text)


def _large() -> int:
    """Bytes that no cache keeps: twice the last level, within 256 MiB and 1 GiB, and an eighth of the memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(max(2 * caches().l3, 256 << 20), 1 << 30, memory // 8)


# ---------------------------------------------------------------- limits


@dataclass(frozen=True)
class Limits:
    """One rung's limits on some number of threads: GB/s, and GFLOP/s or GOP/s (a multiplication and an addition are two)."""

    isa: str
    threads: int
    read_memory: float
    read_l3: float
    read_l2: float
    copy_memory: float
    copy_l3: float
    copy_l2: float
    fp32: float
    int8: float
    int4: float  # bytes by 4-bit integers: their products fit sums of 16 bits, which is one instruction less without VNNI
    bf16: float | None  # None where the rung has no bf16 dot product: kernels then widen to fp32

    def level(self, size: int, cold: bool = False) -> str:
        """Where a warm working set of that many bytes lives; it must leave room for what else runs."""
        here = caches()
        if cold or size > 0.75 * here.l3:
            return "memory"
        return "l2" if size <= 0.75 * here.l2 * self.threads else "l3"

    def transfer(self, size: int, written: int, cold: bool = False) -> tuple[float, str]:
        """The shortest time in seconds in which ``size`` bytes can move, ``written`` of them stores; and by which limit.

        What is written goes at the speed of a copy with as many bytes read; the rest is read.
        """
        level = self.level(size, cold)
        copy, read = getattr(self, f"copy_{level}") * 1e9, getattr(self, f"read_{level}") * 1e9
        copied = min(size, 2 * written)
        name = "copy" if 2 * copied > size else "read"
        return copied / copy + (size - copied) / read, f"{name} {level}"

    def better(self, other: Limits) -> Limits:
        """The higher of each limit, of two measurements of one rung on as many threads."""
        mine, theirs = asdict(self), asdict(other)
        return Limits(**{k: max(v, theirs[k]) if isinstance(v, float) else v for k, v in mine.items()})

    def peak(self, arithmetic: str) -> float:
        """Operations a second of "fp32", "int8", "int4" or "bf16", which is fp32's where widening is the faster way."""
        if arithmetic == "bf16":
            return max(self.bf16 or 0.0, self.fp32) * 1e9
        return {"fp32": self.fp32, "int8": self.int8, "int4": self.int4}[arithmetic] * 1e9


_LOOPS = 4  # of csrc/cpu/limits.cpp, counted up where a loop comes nearer to the limit: what was kept is then too low
_measured: dict[tuple[str, int], Limits] = {}


def cache_file() -> Path:
    """Where measured limits are kept: ``limits.json`` in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fastllm" / "limits.json"


def limits(isa: str | None = None, threads: int | None = None, fresh: bool = False, seconds: float = 1.0) -> Limits:
    """The limits of one rung (default: the one in force) on so many threads (default: PyTorch's).

    Measured once a process, and kept in ``cache_file()`` for the next; ``fresh`` measures again, for about ``seconds``.

    Raises: NotImplementedError without the compiled module, ValueError for a rung that the machine lacks.
    """
    module = cpu_module()
    if module is None:
        raise NotImplementedError(f"limits: {info()['cpu']}")
    isa, threads = isa or module.active_isa(), threads or torch.get_num_threads()
    if isa not in module.isa_names():
        raise value_error("limits", "isa", isa, "one of " + ", ".join(module.isa_names()))
    if threads < 1:
        raise value_error("limits", "threads", threads, "at least 1")
    key = f"{info()['processor']}, {os.cpu_count()} cores, {isa}, {threads} threads, loops {_LOOPS}"
    if not fresh and (isa, threads) in _measured:
        return _measured[isa, threads]
    found = None
    if not fresh:
        with contextlib.suppress(KeyError, TypeError):  # nothing kept, or by another version
            found = Limits(**_kept()[key])
    found = found or _measure(module, isa, threads, seconds)
    _measured[isa, threads] = found
    with contextlib.suppress(OSError):  # a read-only home is no reason to fail
        cache_file().parent.mkdir(parents=True, exist_ok=True)
        write_json(cache_file(), {**_kept(), key: asdict(found)})
    return found


def limits_now(threads: int, seconds: float) -> Limits:
    """The limits of the rung in force at this moment, measured in about ``seconds`` and not kept.

    A virtual machine's are not the same all day: its host moves its cores about, and has other guests. Two cores that share an L3
    share its way to memory; apart they have two (``round_trip`` tells).

    Raises: NotImplementedError without the compiled module.
    """
    module = cpu_module()
    if module is None:
        raise NotImplementedError(f"limits: {info()['cpu']}")
    return _measure(module, module.active_isa(), threads, seconds)


def round_trip() -> float | None:
    """Nanoseconds that a cache line takes to another core and back, the best of many trips in some 20 ms: within one L3 tens to some
    150, between two several hundred. None where this process has one core, or the compiled module is missing."""
    module = cpu_module()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return None if module is None or cores < 2 else module.round_trip(0.02) * 1e9


def _kept() -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(cache_file().read_text(encoding="utf-8"))
        return kept if isinstance(kept, dict) else {}
    return {}


# ---------------------------------------------------------------- measuring


_PIECE = 16 << 20  # bytes: about a millisecond


def _ones(pieces: int, threads: int, size: int) -> torch.Tensor:
    """(pieces, threads, floats) of ones, size bytes in all, in huge pages where the system gives them: the limit is the
    memory's, not the page table's."""
    floats = max(size // 4 // threads // pieces // 128, 1) * 128
    return HugePages().zeros((pieces, threads, floats), torch.float32).fill_(1.0)


def _measure(module: Any, isa: str, threads: int, seconds: float) -> Limits:
    here, each = caches(), seconds / 12
    tiles = torch.full((1024,), 1e-3)  # their products stay far from overflow and from subnormal numbers
    small = torch.ones(1, threads, 128)
    large = _large()
    from_memory, to_memory = (_ones(max(large // _PIECE, 1), threads, large) for _ in range(2))
    with use_isa(isa):

        def timed(limit: str, source: torch.Tensor, target: torch.Tensor, repeats: int) -> tuple[int, float]:
            start = time.perf_counter()
            work = module.limit_loop(limit, source, target, tiles, repeats)
            return work, time.perf_counter() - start

        def best(limit: str, source: torch.Tensor = small, target: torch.Tensor = small) -> float:
            """The best rate, in units of 1e9 a second, of short runs (piece after piece) and long ones in turns: where others
            use the machine too, only a short run is ever undisturbed, while a long one hides a thread that starts late.

            Until nothing better has come for `each` seconds, but for twice that at most.
            """
            pieces, repeats = len(source), 1
            if pieces == 1:  # a short run is 2 ms of one thread
                one, other = source[0, :1], target[0, :1]
                while (took := min(timed(limit, one, other, repeats)[1] for _ in range(2))) < 2e-3:
                    repeats *= 2 if took > 0.5e-3 else 8
                long = (source[0], target[0], 8 * repeats)
            else:
                long = (source.view(threads, -1), target.view(threads, -1), 1)
            fastest, runs, start = 0.0, 0, time.perf_counter()
            end = start + each
            while runs < 6 or time.perf_counter() < end:
                at = runs % pieces
                work, took = timed(limit, *(long if runs % 4 == 3 else (source[at], target[at], repeats)))
                if work / took / 1e9 > 1.01 * fastest:
                    fastest, end = work / took / 1e9, min(time.perf_counter() + each, start + 2 * each)
                runs += 1
            return fastest

        def streams(limit: str, size: int) -> float:
            """With a row a thread: each within its own L2, or all together within L3."""
            return best(limit, _ones(1, threads, size), _ones(1, threads, size))

        copy_l3, copy_l2 = here.l3 // 4, here.l2 * threads // 4  # twice that, with the target
        return Limits(
            isa=isa,
            threads=threads,
            read_memory=best("read", from_memory, from_memory),
            read_l3=streams("read", min(here.l3 // 2, max(4 * here.l2 * threads, here.l3 // 4))),
            read_l2=streams("read", here.l2 * threads // 2),
            copy_memory=best("stream", from_memory, to_memory),
            copy_l3=streams("copy", min(copy_l3, max(2 * here.l2 * threads, copy_l3 // 2))),
            copy_l2=streams("copy", copy_l2),
            fp32=best("fp32"),
            int8=best("int8"),
            int4=best("int4"),
            bf16=best("bf16") if timed("bf16", small[0], small[0], 1)[0] else None,
        )


# ---------------------------------------------------------------- a GPU


@dataclass(frozen=True)
class GpuLimits:
    """What this GPU reaches in the simplest of loads: GB/s of a large copy, its bytes counted twice; GFLOP/s or GOP/s of large
    square products of PyTorch's own libraries (cuBLAS)."""

    copy: float
    fp32: float
    bf16: float
    int8: float

    def peak(self, arithmetic: str) -> float:
        """Operations a second of "fp32", "bf16" or "int8"."""
        return {"fp32": self.fp32, "bf16": self.bf16, "int8": self.int8}[arithmetic] * 1e9


@functools.cache
def gpu_limits() -> GpuLimits:
    """The current GPU's, measured once a process, in about a second. fp32 is without TF32, which is not fp32."""

    def best(run: Any, work: float) -> float:
        fastest = math.inf
        for _ in range(10):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(4):
                run()
            stop.record()
            stop.synchronize()
            fastest = min(fastest, start.elapsed_time(stop) * 1e-3 / 4)
        return work / fastest / 1e9

    def square(n: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.ones(n, n, dtype=dtype, device="cuda")

    source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = best(lambda: target.copy_(source), 2 * source.nbytes)
    n = 8192
    f, h, i = square(n // 2, torch.float32), square(n, torch.bfloat16), square(n, torch.int8)
    return GpuLimits(
        copy,
        fp32=best(lambda: f @ f, 2 * (n // 2) ** 3),
        bf16=best(lambda: h @ h, 2 * n**3),
        int8=best(lambda: torch._int_mm(i, i.t()), 2 * n**3),  # type: ignore[attr-defined]
    )
