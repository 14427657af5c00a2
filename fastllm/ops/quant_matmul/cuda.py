"""quant_matmul in CUDA C++, for few tokens: allocates the output and the kernels' workspace, calls fastllm._cuda."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import cuda_module, forced_backend
from .. import _op
from .._triton import rows

_cuda: Any = cuda_module()

MOST_TOKENS = 64  # of a pass over the weight. Beyond, its bytes are no longer the limit, but the matrix units are


def refuse(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bias: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    zero: int,
    layout: str,
    int8_activations: bool,
) -> str | None:
    reason = _op.refuse_unless_cuda(x, data, scale, minimum, bias)
    if reason is not None:
        return reason
    if x.dtype == torch.float32 and not int8_activations:
        return "fp32 activations have no exact matrix instruction; it takes bf16, fp16, or int8 activations of any dtype"
    if x.stride(-1) != 1 and k != 1:
        return "it reads rows whose last dim has stride 1"
    if bias is not None and bias.stride(0) != 1 and n != 1:
        return "it reads a bias of stride 1"
    if layout != "x16":
        return f"it reads weights in layout 'x16', not '{layout}'; pack() them"
    if data.storage_offset() % 64:
        return "it reads weights that start on a 64-byte boundary"
    if scale.storage_offset() % 8 or (minimum is not None and minimum.storage_offset() % 8):
        return "it reads scales and minimums that start on a 16-byte boundary"
    if x.numel() // k > MOST_TOKENS and forced_backend() != "cuda":
        return f"above {MOST_TOKENS} tokens Triton's tiles, or the dequantised weight with cuBLAS, reuse more of what they read"
    return None


def quant_matmul(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bias: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    zero: int,
    layout: str,
    int8_activations: bool,
) -> Tensor:
    return _product(x, None, data, scale, minimum, bias, (n, k, bits, group_size, zero, int8_activations), x.dtype)


def _product(
    x: Tensor,
    x_groups: Tensor | None,
    data: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bias: Tensor | None,
    form: tuple[int, int, int, int, int, bool],
    dtype: torch.dtype,
) -> Tensor:
    """form: n, k, bits, group_size, zero, int8_activations."""
    y = _op.empty((*x.shape[:-1], form[0]), dtype=dtype, device=x.device)
    floats = _cuda.quant_matmul_workspace(x, x_groups, data, scale, y, *form)
    workspace = _op.empty((floats,), dtype=torch.float32, device=x.device) if floats else None
    _cuda.quant_matmul(x, x_groups, data, scale, minimum, bias, y, workspace, *form)
    return y


def refuse_int8(
    x: Tensor,
    x_groups: Tensor,
    data: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bias: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    zero: int,
    layout: str,
    dtype: torch.dtype,
) -> str | None:
    reason = refuse(x, data, scale, minimum, bias, n, k, bits, group_size, zero, layout, True)
    if reason is not None:
        return reason
    at = rows(x)
    if at is None or not at.evenly or not x_groups.is_contiguous():
        return "it reads integers whose rows lie at one stride, and groups that lie in one piece"
    return _op.refuse_unless_vectors("integers", x=x)


def quant_matmul_int8(
    x: Tensor,
    x_groups: Tensor,
    data: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bias: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    zero: int,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    return _product(x, x_groups, data, scale, minimum, bias, (n, k, bits, group_size, zero, True), dtype)
