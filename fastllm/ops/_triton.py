"""What the ops' Triton kernels share: when they can serve, how rows are addressed, how they are launched and listed.

An op's ``triton.py`` holds its kernels, their launch tables and three functions: ``refuse`` (why these arguments can't be served),
one that runs, and ``builds``, which lists each kernel with every launch that it may get on a kind of GPU, so that they can be
compiled for those that are not here (``fastllm compile``). The file is imported when a call first needs it: Triton costs a second and 70 MiB.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..backends import Backend
from ._launch import gpu_of

__all__ = ["COMPILER", "Build", "Rows", "backend", "device_of", "interpreting", "power_of_two", "rows"]

# a b + c rounds once, as in the CPU kernels. Triton 3.10 will not do that unless it is asked to.
COMPILER = {"enable_fp_fusion": True}
MIN_CAPABILITY = (8, 0)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: right, and thousands of times too slow."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def backend(package: str, run: str, refuse: str = "refuse", name: str = "triton", note: str = "") -> Backend:
    """The backend of the op in ``package`` whose ``triton.py`` has the functions ``run`` and ``refuse``."""

    def module() -> Any:
        if interpreting():
            _mend_interpreter()
        return importlib.import_module(f"{package}.triton")

    def refuses(*args: Any) -> str | None:
        for t in args:
            if isinstance(t, Tensor) and not (t.is_cuda or (t.is_cpu and interpreting())):
                return f"it takes CUDA tensors, not {t.device.type} (TRITON_INTERPRET=1 runs it on the CPU, very slowly)"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed; `pip install triton` brings it"
        device = next(t.device for t in args if isinstance(t, Tensor))
        if device.type == "cuda" and (gpu := gpu_of(device))[:2] < MIN_CAPABILITY:
            return f"it needs a GPU of compute capability 8.0 or newer, not {gpu.major}.{gpu.minor}"
        reason: str | None = getattr(module(), refuse)(*args)
        return reason

    def serve(*args: Any) -> Any:
        return getattr(module(), run)(*args)

    return Backend(name, serve, refuses, note)


@functools.cache
def _mend_interpreter() -> None:
    """The interpreter of Triton 3.6 to 3.9 truncates fp32 to bf16, where every GPU rounds to the nearest, multiplies the bits
    of bf16 matrices as if they were integers, and takes an integer that becomes a bf16 for its bits."""
    from triton import language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            data = torch.from_numpy(src.data.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
            return interpreter.TensorHandle(data, dst_type.scalar)
        if src.dtype.scalar.is_int() and dst_type.scalar == tl.bfloat16:
            return cast_impl(self, cast(self, src, tl.float32), dst_type)
        return cast(self, src, dst_type)

    dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        a, b = (cast_impl(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *args)

    interpreter.InterpreterBuilder.cast_impl = cast_impl
    interpreter.InterpreterBuilder.create_dot = create_dot


def device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device, which has to be the tensor's."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Rows:
    """The rows of a tensor (..., K) as up to three strided dims: row r starts at
    ``r // (n1 n2) * s0 + r // n2 % n1 * s1 + r % n2 * s2``. One dim is ``n1 = n2 = 1``, which costs a kernel nothing."""

    count: int
    n1: int
    n2: int
    s0: int
    s1: int
    s2: int

    @property
    def evenly(self) -> bool:
        """Whether they all lie at one stride, s2."""
        return self.count == self.n2

    @property
    def args(self) -> tuple[int, int, int, int, int]:
        return self.n1, self.n2, self.s0, self.s1, self.s2


def rows(x: Tensor) -> Rows | None:
    """How the rows of x lie, neighbouring dims merged where their strides allow it; None if more than three are left."""
    dims: list[tuple[int, int]] = []
    for n, s in zip(x.shape[:-1], x.stride()[:-1]):
        if n == 1:
            continue
        if dims and dims[-1][1] == n * s:
            dims[-1] = (dims[-1][0] * n, s)
        else:
            dims.append((n, s))
    if len(dims) > 3:
        return None
    (_, s0), (n1, s1), (n2, s2) = [(1, 0)] * (3 - len(dims)) + dims
    count = 1
    for n in x.shape[:-1]:
        count *= n
    # With one dim the last slot holds it: r // (1 n2) is 0 for every row.
    return Rows(count, n1, n2, s0, s1, s2)


@dataclass(frozen=True)
class Build:
    """One launch of one kernel, as it can be compiled with no GPU at hand.

    Args:
        kernel: the ``triton.jit`` function.
        name: the launch in words, e.g. "K=2048 bf16 residual".
        signature: argument -> Triton type, e.g. "*bf16"; arguments that are not named are constants.
        constants: compile-time values that the call's features decide.
        launch: those of its launch table, num_warps and num_stages among them.
        matrix: whether its products must be matrix instructions.
        aligned: integer arguments that are multiples of 16, as the launcher's own specialisation would find.
    """

    kernel: Any
    name: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    launch: Mapping[str, Any] = field(default_factory=dict)
    matrix: bool = False
    aligned: tuple[str, ...] = field(default=())
