"""quant_matmul in CUDA C++, for few tokens: allocates the output and the kernels' workspace, calls fastllm._cuda."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import cuda_module, forced_backend
from .. import _op

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
    y = _op.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    floats = _cuda.quant_matmul_workspace(x, data, scale, y, n, k, bits, group_size, zero, int8_activations)
    workspace = _op.empty((floats,), dtype=torch.float32, device=x.device) if floats else None
    _cuda.quant_matmul(x, data, scale, minimum, bias, y, workspace, n, k, bits, group_size, zero, int8_activations)
    return y
