"""The public function: checks, schema, fake, gradient, and which backends serve."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import Backend
from ...errors import dtype_error, type_error, value_error
from ...quant.activations import Int8Activations, activation_group
from ...quant.tensor import QuantizedTensor
from .. import _check, _op, _triton
from . import cuda, native, reference


def _prepare(
    x: Tensor | Int8Activations, w: QuantizedTensor, bias: Tensor | None = None, *, activations: str = "float"
) -> tuple[Any, ...]:
    if not isinstance(x, Int8Activations):
        _check.floating("quant_matmul", "x", x, min_dim=1)
    if not isinstance(w, QuantizedTensor):
        raise type_error("quant_matmul", "w", w, "a QuantizedTensor", "(fastllm.quantize makes one)")
    if isinstance(x, Int8Activations):
        _check_rounded(x, activation_group(w.group_size))
    n, k = w.shape
    if x.shape[-1] != k:
        raise _check.shape_error("quant_matmul", "x", x.shape, f"(..., {k})", f"to match w {w.shape}")
    if w.data.device != x.device:
        raise ValueError(f"quant_matmul: w is on {w.data.device}, expected {x.device} to match x")
    if bias is not None:
        _check.like("quant_matmul", "bias", bias, x.dtype, x.device)
        if bias.dim() != 1 or bias.shape[0] != n:
            raise _check.shape_error("quant_matmul", "bias", bias.shape, f"({n},)", f"to match w {w.shape}")
    if activations not in ("float", "int8"):
        raise value_error("quant_matmul", "activations", activations, "'float' or 'int8'")
    if w.layout != "x16" and not torch.compiler.is_compiling():
        w = packed(w)
    weight = w.data, w.scale, w.minimum, bias, n, k, w.bits, w.group_size, w.zero, w.layout
    if isinstance(x, Int8Activations):
        return x.data, x.groups, *weight, x.dtype
    return x, *weight, activations == "int8"


def _check_rounded(x: Int8Activations, group_size: int) -> None:
    """That it is in the groups that the weight asks for, and, for those who make their own, well made."""
    op = "quant_matmul"
    if x.group_size != group_size:
        raise value_error(
            op, "group_size of x", x.group_size, f"{group_size}", "fastllm.quant.activation_group of the weight's"
        )
    _check.tensor(op, "x.data", x.data)
    _check.like(op, "x.groups", x.groups, torch.float32, x.data.device, "int8 activations")
    if x.data.dtype != torch.int8:
        raise dtype_error(op, "x.data", x.data.dtype, "torch.int8")
    if x.dtype not in _check.FLOATS:
        raise dtype_error(op, "x", x.dtype, "torch.float32, torch.bfloat16 or torch.float16")
    if x.data.dim() == 0:
        raise _check.shape_error(op, "x.data", x.shape, "at least 1 dim")
    expected = (*x.shape[:-1], -(-x.shape[-1] // x.group_size), 2)
    if x.groups.shape != expected:
        because = f"for x.data {tuple(x.shape)} in groups of {x.group_size}"
        raise _check.shape_error(op, "x.groups", x.groups.shape, f"{expected}", because)


def packed(w: QuantizedTensor) -> QuantizedTensor:
    """The weight in the layout that kernels read, made once and kept with the weight."""
    kept = w.__dict__.get("_packed")
    if kept is None:
        kept = w.pack()
        object.__setattr__(w, "_packed", kept)  # frozen, and this changes nothing that a reader of w can see
    return kept


def _stored(
    data: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    zero: int,
    layout: str,
) -> QuantizedTensor:
    return QuantizedTensor(data, scale, minimum, zero, (n, k), bits, group_size, layout)


def _reference(
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
    w = _stored(data, scale, minimum, n, k, bits, group_size, zero, layout)
    return reference.quant_matmul(x, w, bias, activations="int8" if int8_activations else "float")


def _reference_int8(
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
    w = _stored(data, scale, minimum, n, k, bits, group_size, zero, layout)
    return reference.quant_matmul(Int8Activations(x, x_groups, activation_group(group_size), dtype), w, bias)


def _fake(x: Tensor, data: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None, n: int, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


def _fake_int8(x: Tensor, x_groups: Tensor, *args: Any) -> Tensor:
    n, dtype = args[4], args[-1]
    return x.new_empty((*x.shape[:-1], n), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, data, scale, minimum, _, *ctx.form, _ = inputs
    ctx.save_for_backward(data, scale, minimum)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """d/dx = grad_y w and d/dbias = the sum of grad_y over rows; rounding of activations passes gradients straight."""
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        raise NotImplementedError("quant_matmul: no gradient to scale and minimum, because the stored weight is not trained")
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad_y @ _stored(*ctx.saved_tensors, *ctx.form).dequantize(grad_y.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = grad_y.flatten(0, -2).float().sum(0).to(grad_y.dtype) if grad_y.dim() > 1 else grad_y.clone()
    return grad_x, None, None, None, grad_bias, *(None,) * 7


_op_quant_matmul = _op.Op(
    "quant_matmul",
    "(Tensor x, Tensor data, Tensor scale, Tensor? minimum, Tensor? bias, SymInt n, SymInt k, int bits, int group_size, "
    "int zero, str layout, bool int8_activations) -> Tensor",
    fake=_fake,
    backends=(
        Backend("cpu", native.quant_matmul, native.refuse),
        Backend("cuda", cuda.quant_matmul, cuda.refuse),
        _triton.backend(__package__, "dequantized_matmul", "refuse_dequantized", name="torch"),
        _triton.backend(__package__, "quant_matmul"),
        Backend("reference", _reference, _check.never_refuse),
    ),
    prepare=_prepare,
    backward=(_setup_context, _backward),
)
_op_int8 = _op.Op(
    "quant_matmul_int8",
    "(Tensor x, Tensor x_groups, Tensor data, Tensor scale, Tensor? minimum, Tensor? bias, SymInt n, SymInt k, int bits, "
    "int group_size, int zero, str layout, ScalarType dtype) -> Tensor",
    fake=_fake_int8,
    backends=(
        Backend("cpu", native.quant_matmul_int8, native.refuse_int8),
        Backend("cuda", cuda.quant_matmul_int8, cuda.refuse_int8),
        _triton.backend(__package__, "quant_matmul_int8", "refuse_int8"),
        Backend("reference", _reference_int8, _check.never_refuse),
    ),
    prepare=_prepare,
    no_gradient="integers have none",
    instead="call quant_matmul(..., activations='int8') on what was rounded, which passes gradients straight through rounding",
)


def quant_matmul(
    x: Tensor | Int8Activations, w: QuantizedTensor, bias: Tensor | None = None, *, activations: str = "float"
) -> Tensor:
    """A linear layer whose weight is stored in 4 or 8 bits.

    y[m, n] = sum_k x[m, k] w[n, k] + bias[n];  w[n, k] = (q[n, k] - zero) * scale[n, k // group] + minimum[n, k // group]

    Args:
        x: (..., K) fp32|bf16|fp16; rows may be strided. Or an ``Int8Activations`` (..., K) in groups of A columns (see
            ``activations``), as ``rms_norm`` and ``gated_activation`` write it: it is taken as it is, whatever ``activations`` says.
        w: (N, K), 4 or 8 bits, groups of 32, 64, 128 or K columns. Kernels read its "x16" layout: a weight in layout
            "rows" is packed at the first call and the packed copy is kept with it, so pass ``w.pack()`` to hold one copy.
        bias: (N,) of x's dtype.
        activations: "float" keeps x as it is. "int8" rounds it, for each token and group of A columns (A = the weight's
            group if that is 32 or 64, else 128): amax = max|x|, integer = round_half_even(x * (127 / amax)),
            scale = amax / 127, all in fp32; a group with amax < 2^-100 counts as zero.

    Returns:
        y (..., N) of x's dtype.

    Raises:
        TypeError: a dtype other than fp32, bf16, fp16, a bias of another one, or a w that is no QuantizedTensor.
        ValueError: a shape, device or group of x that does not match, or an unknown ``activations``.

    Numerics: "float" makes each weight in fp32 and sums in fp32, 128 columns at a time (in CUDA C++ it sums integers times x for 32
    columns, then scales the sum, so that no weight is rounded); "int8" sums each group exactly in
    int32, then groups in fp32. bias is added before the one rounding to x's dtype. An infinity or NaN in a row of x makes
    that row of y NaN or infinite ("int8": NaN throughout). On the CPU a row's bits do not depend on the batch or on the
    number of threads. Gradients to x and bias; the weight has none; "int8" passes the gradient straight through rounding; an
    ``Int8Activations`` has none, and its products none.
    Cost: N K bits / 8 bytes of weights plus scales; 2 M N K operations.
    Source: weight formats of llama.cpp's Q4_0, Q4_1, Q8_0, GPTQ (arXiv:2210.17323), AWQ (arXiv:2306.00978) and HQQ.
    """
    args = _prepare(x, w, bias, activations=activations)
    y: Tensor = (_op_int8 if isinstance(x, Int8Activations) else _op_quant_matmul)(*args)
    return y
