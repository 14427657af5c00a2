"""The one shape of every error text: op, argument, got, expected, because.

``rms_norm: weight has shape (4096,), expected (2048,) to match the last dim of x (1, 7, 2048)``

The functions return the exception instead of raising it, so that a call site reads ``raise shape_error(...)`` and type
checkers see the control flow.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["dtype_error", "no_backend_error", "shape_error", "type_error", "value_error"]


def _tail(because: str) -> str:
    return f" {because}" if because else ""


def type_error(op: str, arg: str, got: Any, expected: str, because: str = "") -> TypeError:
    """A value of the wrong Python type, e.g. a list where a tensor belongs."""
    return TypeError(f"{op}: {arg} is a {type(got).__name__}, expected {expected}{_tail(because)}")


def dtype_error(op: str, arg: str, got: torch.dtype, expected: str, because: str = "") -> TypeError:
    """A tensor of a dtype that the op does not take."""
    return TypeError(f"{op}: {arg} has dtype {got}, expected {expected}{_tail(because)}")


def shape_error(op: str, arg: str, got: Any, expected: str, because: str = "") -> ValueError:
    """A tensor of the wrong rank or size."""
    return ValueError(f"{op}: {arg} has shape {tuple(got)}, expected {expected}{_tail(because)}")


def value_error(op: str, arg: str, got: Any, expected: str, because: str = "") -> ValueError:
    """A scalar, string or file outside of what the op takes."""
    return ValueError(f"{op}: {arg} is {got!r}, expected {expected}{_tail(because)}")


def no_backend_error(op: str, reasons: dict[str, str]) -> NotImplementedError:
    """No backend can serve the call; each says why in its own words."""
    lines = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return NotImplementedError(f"{op}: no backend can serve this call ({lines})")
