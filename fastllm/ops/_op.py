"""The one clever file: how a call of a public function reaches a kernel.

A public function checks its arguments, then calls its ``Op``. Two doors lead on. The direct door calls the chosen backend at
once; it opens only where nobody could notice the difference: plain tensors, no gradient wanted, nothing compiling, tracing or
intercepting. Otherwise the registered door, ``torch.ops.fastllm.<name>``, which has a fake, an autograd formula or a stated
refusal, and the same backends behind it. docs/architecture.md has the microseconds of both.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.library import Library

from .. import backends as _backends
from ..backends import Backend
from ..errors import no_backend_error
from ..pages import Scratch
from ._launch import gpu_of

__all__ = [
    "OPS",
    "Op",
    "empty",
    "note_write",
    "outputs_in",
    "refuse_gradient",
    "refuse_unless_cpu",
    "refuse_unless_cuda",
    "refuse_unless_vectors",
]

_library = Library("fastllm", "DEF")
OPS: dict[str, Op] = {}


class _Here(threading.local):
    """What holds for this thread."""

    scratch: Scratch | None = None


_here = _Here()
_empty = torch.empty


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """Every output is allocated through this name: in the thread's scratch memory where there is one (``outputs_in``), and so that
    tests can hand out poisoned memory with guards around it."""
    scratch = _here.scratch
    if scratch is not None and (device is None or device.type == "cpu"):
        return scratch.empty(shape, dtype)
    if not shape:
        return _empty((), dtype=dtype, device=device)
    return _empty(*shape, dtype=dtype, device=device)  # faster than torch.empty(shape)


@contextlib.contextmanager
def outputs_in(scratch: Scratch) -> Iterator[None]:
    """Ops called in this context, by this thread, have their CPU outputs in this memory."""
    before, _here.scratch = _here.scratch, scratch
    try:
        yield
    finally:
        _here.scratch = before


_forced_get = _backends._forced.get
_cuda_runs_here = _backends.cuda_executor()
_Tensor = torch.Tensor
_Parameter = torch.nn.Parameter
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack
_tracing_state = torch._C._get_tracing_state


def _direct(args: Sequence[Any]) -> bool:
    """True where calling a backend straight away cannot be told from going through PyTorch's dispatcher."""
    grad = _is_grad_enabled()
    for a in args:
        kind = type(a)
        if kind is _Tensor or kind is _Parameter:
            # A lazily negated tensor's memory holds the opposite of its values; the dispatcher resolves it.
            if (grad and a.requires_grad) or a.is_neg():
                return False
        elif isinstance(a, _Tensor):  # a subclass: FakeTensor, DTensor, ...
            return False
    return (
        _dispatch_modes() == 0
        and _function_modes() == 0
        and _functorch_level() is None
        and _tracing_state() is None
        and forward_ad._current_level < 0
    )


def _has_tangent(t: torch.Tensor) -> bool:
    return forward_ad.unpack_dual(t).tangent is not None


class Op:
    """One op: a schema, a fake, a gradient or the reason why there is none, and backends in order of preference.

    Args:
        name: the op's name under ``torch.ops.fastllm``.
        schema: PyTorch schema without the name, e.g. ``"(Tensor x, float eps) -> Tensor"``.
        fake: same arguments, returns empty tensors of the right shape, dtype and device.
        backends: the first one that does not refuse the arguments serves.
        prepare: the public function's checks: takes its arguments, returns the schema's as a tuple. ``explain`` uses it.
        backward: ``(setup_context, backward)`` as ``torch.library.register_autograd`` takes them.
        no_gradient: in place of ``backward``: one sentence that a caller who asks for gradients is told. An op whose
            schema marks an argument as written to, ``Tensor(a!)``, needs it.
        instead: with ``no_gradient``, what to call where PyTorch cannot differentiate the reference either: integers have no
            gradient. The forced reference then refuses too.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        fake: Callable[..., Any],
        backends: Sequence[Backend],
        prepare: Callable[..., tuple[Any, ...]],
        backward: tuple[Callable[..., None], Callable[..., Any]] | None = None,
        no_gradient: str = "",
        instead: str = "",
    ) -> None:
        self.name = name
        self.backends = tuple(backends)
        self.prepare = prepare
        self.fake = fake
        self._instead = instead
        _library.define(name + schema)
        _library.impl(name, self._serve_registered, "CompositeExplicitAutograd")
        qualified = f"fastllm::{name}"
        torch.library.register_fake(qualified, fake, lib=_library)
        self.registered = getattr(torch.ops.fastllm, name).default
        if self.registered._schema.is_mutable:
            # PyTorch takes no formula for an op that writes into its arguments: refuse when called, not in the backward.
            _library.impl(name, self._serve_without_gradient, "Autograd", with_keyset=True)
            self._refuse_gradient = refuse_gradient(name, no_gradient, instead)
        else:
            setup, formula = backward or (None, refuse_gradient(name, no_gradient, instead))
            torch.library.register_autograd(qualified, formula, setup_context=setup, lib=_library)
        OPS[name] = self

    def __call__(self, *args: Any) -> Any:
        if _is_compiling():
            return self.registered(*args)
        # The forced reference is plain PyTorch all the way: autograd, functorch and modes see through it by themselves.
        if _direct(args) or (_forced_get() == "reference" and not self._instead):
            return self._serve(*args)
        self._refuse_tangents(args)
        return self.registered(*args)

    def _serve(self, *args: Any) -> Any:
        return self.choose(args).run(*args)

    def _serve_registered(self, *args: Any) -> Any:
        self._refuse_tangents(args)
        return self._serve(*args)

    def _refuse_tangents(self, args: Sequence[Any]) -> None:
        """PyTorch would drop the tangents of forward-mode differentiation in silence. Asked in the kernel for those who
        call torch.ops themselves, and before, because torch.func's tangents do not reach the kernel."""
        if forward_ad._current_level >= 0 and any(isinstance(a, _Tensor) and _has_tangent(a) for a in args):
            other = 'use reverse mode, or fastllm.use_backend("reference") before the forward, which PyTorch differentiates'
            raise NotImplementedError(f"{self.name}: no forward-mode gradient; {self._instead or other}")

    def _serve_without_gradient(self, keyset: Any, *args: Any) -> Any:
        for a in args:
            if isinstance(a, _Tensor) and _is_grad_enabled() and a.requires_grad:
                self._refuse_gradient(None)
        with torch._C._AutoDispatchBelowAutograd():
            return self.registered.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def choose(self, args: Sequence[Any]) -> Backend:
        """The backend that serves these prepared arguments. Raises NotImplementedError with every reason if none does."""
        forced = _forced_get()
        reasons = {}
        for backend in self.backends:
            if forced is not None and backend.name != forced:
                continue
            reason = backend.refuse(*args)
            if reason is None:
                return backend
            reasons[backend.name] = reason
        if forced is not None and not reasons:
            reasons[forced] = f"{self.name} has no such backend"
        raise no_backend_error(self.name, reasons)

    def explain(self, args: Sequence[Any]) -> list[tuple[str, bool, str]]:
        """(backend, serves, why) for each backend in order of preference; at most one serves."""
        forced, chosen = _forced_get(), False
        rows: list[tuple[str, bool, str]] = []
        for backend in self.backends:
            reason = backend.refuse(*args)
            if forced is not None and backend.name != forced:
                reason = f"{forced} is forced"
            serves = reason is None and not chosen
            if serves:
                why = "forced" if forced else "first in order that can serve the call"
                why += f"; {backend.note}" if backend.note else ""
            else:
                why = reason or f"can serve the call, but {next(name for name, ok, _ in rows if ok)} is preferred"
            chosen |= serves
            rows.append((backend.name, serves, why))
        return rows


def note_write(*tensors: torch.Tensor) -> None:
    """Autograd must notice if it had saved what a kernel has just overwritten."""
    for t in tensors:
        if not t.is_inference():
            torch.autograd.graph.increment_version(t)


def refuse_gradient(name: str, why: str, instead: str = "") -> Callable[..., Any]:
    """A formula that says why there is none, and what to call."""
    instead = instead or (
        "call it under torch.no_grad(), "
        'or under fastllm.use_backend("reference") before the forward, which PyTorch differentiates'
    )

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"{name}: no gradient, because {why}; {instead}")

    return refuse


def refuse_unless_cpu(*tensors: torch.Tensor | None) -> str | None:
    """Why the compiled CPU module can't serve these tensors, or None."""
    if _backends._cpu_loaded is None:
        return _backends._cpu_error
    for t in tensors:
        if t is not None and not t.is_cpu:
            return f"it takes CPU tensors, not {t.device.type}"
    return None


def refuse_unless_cuda(*tensors: torch.Tensor | None) -> str | None:
    """Why the compiled CUDA module can't serve these tensors, or None."""
    if _backends._cuda_loaded is None:
        return _backends._cuda_error
    for t in tensors:
        if t is None:
            continue
        if t.is_cuda:
            gpu = gpu_of(t.device)  # all are on one device: the op's checks have seen to it
            return "it has no kernels for AMD's GPUs" if gpu.hip else _backends.cuda_refusal(gpu.major, gpu.minor)
        if not (t.is_cpu and _cuda_runs_here):
            return f"it takes CUDA tensors, not {t.device.type}"
    return None


def refuse_unless_vectors(what: str, **tensors: torch.Tensor | None) -> str | None:
    """Why rows of these tensors can't be read 16 bytes at a time, or None."""
    for name, t in tensors.items():
        if t is not None and (why := _unaligned(t)):
            return f"it reads {what} in pieces of 16 bytes at addresses that are multiples of 16; {name} {why}"
    return None


def _unaligned(x: torch.Tensor) -> str | None:
    if not x.numel():
        return None
    *rows, last = x.shape
    if x.stride(-1) != 1 and last != 1:
        return f"has stride {x.stride(-1)} in its last dim, not 1"
    if last * x.element_size() % 16:
        return f"has rows of {last} elements of {x.element_size()} bytes"
    # `explain` asks with tensors that have no memory.
    address = x.storage_offset() * x.element_size() if isinstance(x, FakeTensor) else x.data_ptr()
    if address % 16:
        return "lies at one that is not"
    for n, stride in zip(rows, x.stride()):
        if n > 1 and stride * x.element_size() % 16:
            return f"has strides {tuple(x.stride())} in elements of {x.element_size()} bytes, which lead to others"
    return None
