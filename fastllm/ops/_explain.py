"""Which backend serves a call, and why the others do not: asked of the public function itself, so that it cannot disagree."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .. import backends
from ..errors import value_error
from ..quant import QuantizedTensor
from ._op import OPS, Op

__all__ = ["Choice", "Explanation", "described", "explain", "ops_reached", "rung_of"]


@dataclass(frozen=True)
class Choice:
    """One backend of one registered op: whether it serves the call, and why or why not."""

    op: str
    backend: str
    serves: bool
    why: str


@dataclass(frozen=True)
class Explanation:
    """What ``fastllm.explain`` found; ``str()`` is the text that it prints."""

    call: str
    choices: tuple[Choice, ...]

    @property
    def backend(self) -> str | None:
        """The backend that serves the call, or the first of them where the call reaches several ops; None if none does."""
        return next((choice.backend for choice in self.choices if choice.serves), None)

    def __str__(self) -> str:
        lines = [self.call]
        width = max(len(choice.backend) for choice in self.choices)
        seen = {choice.op for choice in self.choices}
        for op in dict.fromkeys(choice.op for choice in self.choices):
            if len(seen) > 1 or not self.call.startswith(f"{op}("):
                lines.append(f"  torch.ops.fastllm.{op}")
            rows = [choice for choice in self.choices if choice.op == op]
            lines += [f"  {'->' if row.serves else '  '} {row.backend:<{width}}  {row.why}" for row in rows]
            if not any(row.serves for row in rows):
                lines.append("  no backend can serve this call: it raises NotImplementedError")
        return "\n".join(lines)


class _Watch(TorchDispatchMode):
    """Notes each call of a registered op and answers it with the op's fake, so that nothing is computed or written."""

    def __init__(self) -> None:
        super().__init__()
        self.reached: list[tuple[Op, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = OPS.get(func._schema.name.partition("::")[2]) if func.namespace == "fastllm" else None
        if op is None:
            return func(*args, **kwargs)
        # The dispatcher drops trailing arguments that equal their defaults.
        rest = func._schema.arguments[len(args) :]
        prepared = (*args, *(kwargs.get(a.name, a.default_value) for a in rest))
        self.reached.append((op, prepared))
        return op.fake(*prepared)


def ops_reached(call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[Op, tuple[Any, ...]]]:
    """The registered ops that a public function would call, with their prepared arguments; nothing is computed.

    An active dispatch mode closes the direct door, so every call comes by the registered one, where it can be seen.
    """
    watch = _Watch()
    with backends.use_backend(None), torch.no_grad(), watch:
        call(*args, **kwargs)
    return watch.reached


def rung_of(op: str) -> str:
    """The CPU rung that would serve an op now: the active one, or the nearest below that the op's kernels fill."""
    module = backends.cpu_module()
    if module is None:
        return ""
    kernels = {name: rung() for name, rung in sorted(module.kernels.items())}
    # apply_rotary is served by the kernel rotary, attention by attention_prefill and attention_decode.
    own = {rung for name, rung in kernels.items() if name in op or op in name or name.replace(" ", "_") == op}
    return " or ".join(sorted(own)) if own else module.active_isa()


def explain(op: str, /, *args: Any, **kwargs: Any) -> Explanation:
    """Print and return which backend serves a call, and why the others do not.

    >>> fastllm.explain("rms_norm", x, weight, eps=1e-5)

    Args:
        op: the name of a public op, e.g. ``"rms_norm"``.
        args, kwargs: what the op itself would be called with. Nothing is computed and no argument is written to, so
            FakeTensors, which have a shape and a device but no data, serve as well.

    Returns:
        An Explanation: ``backend`` names the one that serves, ``choices`` has a row for each, ``str()`` is the text.

    Raises:
        ValueError: an unknown op. Otherwise whatever the op's own checks raise for these arguments.
    """
    module = importlib.import_module(__package__)
    names = sorted(module.__all__)
    if op not in names:
        raise value_error("explain", "op", op, "one of " + ", ".join(names))
    reached = ops_reached(getattr(module, op), args, kwargs)
    if not reached:
        raise value_error("explain", "op", op, "a function that a kernel serves")
    choices = []
    for registered, prepared in reached:
        for backend, serves, why in registered.explain(prepared):
            threads = torch.get_num_threads()
            where = (
                f" (rung {rung_of(registered.name)}, {threads} thread{'s' if threads > 1 else ''})" if backend == "cpu" else ""
            )
            choices.append(Choice(registered.name, backend, serves, why + where if serves else why))
    text = ", ".join([*map(_shown, args), *(f"{name}={_shown(value)}" for name, value in kwargs.items())])
    found = Explanation(f"{op}({text})", tuple(dict.fromkeys(choices)))
    print(found)
    return found


def _shown(value: Any) -> str:
    if hasattr(value, "shape"):  # a tensor, or a quantised one
        kind = str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else type(value).__name__
        device = getattr(value, "device", torch.device("cpu"))
        return f"{kind}[{'x'.join(map(str, value.shape))}]" + ("" if device.type == "cpu" else f" on {device}")
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__}(...)"


# ---------------------------------------------------------------- arguments in words

_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}
_VALUES = {"none": None, "true": True, "false": False}
_TENSOR = re.compile(r"(?:(?P<kind>fp32|bf16|fp16|int64|int32|bool|int4|int8):)?(?P<shape>\d+(?:x\d+)*)(?::(?P<group>-1|\d+))?")


def described(text: str, dtype: torch.dtype, device: str) -> Any:
    """An argument that a command line describes: a tensor that has a shape and no data, on a device that need not be there.

    "4x4096" is a tensor of ``dtype``, "int64:8" one of another, "int4:14336x4096:128" a quantised weight in groups of 128 (64 where
    nothing is said); "none", "true", "false", "0.5" and other words are themselves.

    Raises: ValueError for a group that does not divide a weight's columns.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    if text.lower() in _VALUES:
        return _VALUES[text.lower()]
    found = _TENSOR.fullmatch(text)
    if found is None:
        try:
            return float(text)
        except ValueError:
            return text
    shape, kind = tuple(map(int, found["shape"].split("x"))), found["kind"]
    with FakeTensorMode():
        if kind not in ("int4", "int8"):
            return torch.empty(shape, dtype=_DTYPES[kind] if kind else dtype, device=device)
        if len(shape) != 2:
            raise value_error("explain", "argument", text, "a weight as in int4:14336x4096:128")
        bits, (n, k) = int(kind[3:]), shape
        group = k if found["group"] == "-1" else int(found["group"] or 64)
        if group == 0 or k % group:
            raise value_error("explain", "group", group, f"a divisor of {k}")
        blocks, lines = -(-n // 16), -(-k // 8) * (8 * bits // 32)
        data = torch.empty((blocks, lines, 64), dtype=torch.uint8, device=device)
        scale = torch.empty((blocks, k // group, 16), dtype=torch.float16, device=device)
    return QuantizedTensor(data, scale, None, 1 << (bits - 1), (n, k), bits, group, "x16")
