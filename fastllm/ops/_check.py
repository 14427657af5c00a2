"""Checks that every op's public function makes, in one wording."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import dtype_error, shape_error, type_error, value_error
from ..quant.tensor import GROUP_SIZES

__all__ = [
    "FLOATS",
    "dtype_error",
    "floating",
    "int8_group",
    "like",
    "never_refuse",
    "number",
    "shape_error",
    "tensor",
    "type_error",
    "value_error",
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def tensor(op: str, arg: str, value: Any) -> None:
    """A dense (strided) tensor, or a TypeError."""
    if not isinstance(value, Tensor):
        raise type_error(op, arg, value, "a torch.Tensor")
    if value.layout is not torch.strided:
        raise TypeError(f"{op}: {arg} has layout {value.layout}, expected a dense (strided) tensor")


def floating(op: str, arg: str, value: Any, min_dim: int = 0) -> None:
    """A tensor of fp32, bf16 or fp16 (fp64 is for the reference) with at least min_dim dims."""
    tensor(op, arg, value)
    if value.dtype not in FLOATS:
        raise dtype_error(op, arg, value.dtype, "torch.float32, torch.bfloat16 or torch.float16")
    if value.dim() < min_dim:
        raise shape_error(op, arg, value.shape, f"at least {min_dim} dim{'s' if min_dim > 1 else ''}")


def like(op: str, arg: str, value: Any, dtype: torch.dtype, device: torch.device, of: str = "x") -> None:
    """A tensor of the same dtype and device as another argument."""
    tensor(op, arg, value)
    if value.dtype != dtype:
        raise dtype_error(op, arg, value.dtype, str(dtype), f"to match {of}")
    if value.device != device:
        raise ValueError(f"{op}: {arg} is on {value.device}, expected {device} to match {of}")


def number(op: str, arg: str, value: Any) -> None:
    """A real number (bool does not count), or a TypeError."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise type_error(op, arg, value, "a number")


def int8_group(op: str, value: Any) -> int:
    """How many columns of an int8 result share a scale."""
    number(op, "int8_group", value)
    if value not in GROUP_SIZES:
        raise value_error(
            op, "int8_group", value, "None, 32, 64 or 128", "as many as fastllm.quant.activation_group says of a weight"
        )
    return int(value)


def never_refuse(*_: object) -> None:
    """The reference serves everything."""
