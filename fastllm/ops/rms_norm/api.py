"""The public function: checks, schemas, fakes, gradients, and which backends serve."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...backends import Backend
from ...errors import value_error
from ...quant.activations import Int8Activations
from .. import _check, _op, _triton
from . import cuda, native, reference

# Two schemas, because a PyTorch op cannot return a tensor or two. The arguments are the same; and so again with int8 results.
_ARGUMENTS = "Tensor x, Tensor? weight, Tensor? residual, float eps, float offset, bool round_before_weight"


def _prepare(
    x: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    offset: float = 0.0,
    rounding: str = "llama",
    int8_group: int | None = None,
) -> tuple[Any, ...]:
    _check.floating("rms_norm", "x", x, min_dim=1)
    if x.shape[-1] == 0:
        raise _check.shape_error("rms_norm", "x", x.shape, "a last dim of at least 1")
    if weight is not None:
        _check.like("rms_norm", "weight", weight, x.dtype, x.device)
        if weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
            because = f"to match the last dim of x {tuple(x.shape)}"
            raise _check.shape_error("rms_norm", "weight", weight.shape, f"({x.shape[-1]},)", because)
    if residual is not None:
        _check.like("rms_norm", "residual", residual, x.dtype, x.device)
        if residual.shape != x.shape:
            raise _check.shape_error("rms_norm", "residual", residual.shape, f"{tuple(x.shape)}", "to match x")
    _check.number("rms_norm", "eps", eps)
    _check.number("rms_norm", "offset", offset)
    if not (eps >= 0.0 and math.isfinite(eps)):
        raise value_error("rms_norm", "eps", eps, "a finite number of at least 0")
    if not math.isfinite(offset):
        raise value_error("rms_norm", "offset", offset, "a finite number")
    if rounding not in ("llama", "gemma"):
        raise value_error("rms_norm", "rounding", rounding, "'llama' or 'gemma'")
    args = x, weight, residual, float(eps), float(offset), rounding == "llama"
    return args if int8_group is None else (*args, _check.int8_group("rms_norm", int8_group))


def _reference(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, offset: float, round_before_weight: bool
) -> Any:
    rounding = "llama" if round_before_weight else "gemma"
    return reference.rms_norm(x, weight, eps, residual=residual, offset=offset, rounding=rounding)


def _reference_int8(*args: Any) -> tuple[Tensor, ...]:
    x, weight, residual, eps, offset, round_before_weight, group_size = args
    y = _reference(x, weight, residual, eps, offset, round_before_weight)
    y, *h = (y,) if residual is None else y
    rounded = Int8Activations.of(y, group_size)
    return rounded.data, rounded.groups, *h


def _fake(x: Tensor, weight: Tensor | None, residual: Tensor | None, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _fake_residual(x: Tensor, weight: Tensor | None, residual: Tensor | None, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_int8(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *rows, K = x.shape
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*rows, -(-K // args[-1]), 2), dtype=torch.float32)


def _fake_residual_int8(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return *_fake_int8(x, *args), x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, residual, ctx.eps, ctx.offset, ctx.round_before_weight = inputs
    ctx.save_for_backward(x if residual is None else output[1], weight)


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor | None]:
    """d/dh and d/dweight of y = round(h r) (weight + offset), r = 1 / sqrt(mean(h^2) + eps).

    With n = h r and g = grad_y (weight + offset): d/dh = r (g - n mean(g n)); d/dweight = the sum of grad_y n over rows.
    """
    h, weight = ctx.saved_tensors
    wide = h.float()
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + ctx.eps)
    normed = wide * r
    g = grad_y.float()
    grad_weight = None
    if weight is not None:
        if ctx.needs_input_grad[1]:
            seen = normed.to(h.dtype).float() if ctx.round_before_weight else normed
            grad_weight = (g * seen).flatten(0, -2).sum(0).to(weight.dtype)
        g = g * (weight.float() + ctx.offset)
    return r * (g - normed * (g * normed).mean(-1, keepdim=True)), grad_weight


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_weight = _gradients(ctx, grad_y)
    return grad_x.to(grad_y.dtype), grad_weight, None, None, None, None


def _backward_residual(ctx: Any, grad_y: Tensor, grad_sum: Tensor) -> tuple[Tensor | None, ...]:
    grad_h, grad_weight = _gradients(ctx, grad_y)
    grad_h = (grad_h + grad_sum.float()).to(grad_y.dtype)
    # x and residual enter as a sum: both get its gradient. A copy, because autograd may accumulate in place.
    return grad_h, grad_weight, grad_h.clone(), None, None, None


_BACKENDS = (
    Backend("cpu", native.rms_norm, native.refuse),
    Backend("cuda", cuda.rms_norm, cuda.refuse),
    _triton.backend(__package__, "rms_norm"),
    Backend("reference", _reference, _check.never_refuse),
)
_plain = _op.Op(
    "rms_norm",
    f"({_ARGUMENTS}) -> Tensor",
    fake=_fake,
    backends=_BACKENDS,
    prepare=_prepare,
    backward=(_setup_context, _backward),
)
_with_residual = _op.Op(
    "rms_norm_residual",
    f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    fake=_fake_residual,
    backends=_BACKENDS,
    prepare=_prepare,
    backward=(_setup_context, _backward_residual),
)
_BACKENDS_INT8 = (
    Backend("cpu", native.rms_norm_int8, native.refuse),
    Backend("cuda", cuda.rms_norm_int8, cuda.refuse_int8),
    _triton.backend(__package__, "rms_norm_int8"),
    Backend("reference", _reference_int8, _check.never_refuse),
)
_INSTEAD = (
    "call rms_norm without int8_group and quant_matmul(..., activations='int8') on its result, "
    "which passes gradients straight through rounding"
)
_int8 = _op.Op(
    "rms_norm_int8",
    f"({_ARGUMENTS}, int group_size) -> (Tensor, Tensor)",
    fake=_fake_int8,
    backends=_BACKENDS_INT8,
    prepare=_prepare,
    no_gradient="integers have none",
    instead=_INSTEAD,
)
_with_residual_int8 = _op.Op(
    "rms_norm_residual_int8",
    f"({_ARGUMENTS}, int group_size) -> (Tensor, Tensor, Tensor)",
    fake=_fake_residual_int8,
    backends=_BACKENDS_INT8,
    prepare=_prepare,
    no_gradient="integers have none",
    instead=_INSTEAD,
)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    offset: float = 0.0,
    rounding: str = "llama",
    int8_group: int | None = None,
) -> Any:
    """Root-mean-square norm of each row, with the residual added first if there is one.

    h = x + residual;  y = h / sqrt(mean(h^2) + eps) * (weight + offset)

    Args:
        x: (..., K) fp32|bf16|fp16; rows may be strided.
        weight: (K,) of x's dtype, or None for 1.
        eps: added to the mean square, in its units.
        residual: shape and dtype of x.
        offset: added to the weight: 1.0 for Gemma, whose checkpoints store weight - 1.
        rounding: "llama" rounds the normed value to x's dtype before the weight multiplies it, "gemma" after.
        int8_group: 32, 64 or 128: y comes in int8, with a scale for so many columns, as ``quant_matmul`` takes it
            (``fastllm.quant.activation_group(w.group_size)``).

    Returns:
        y (..., K) of x's dtype, or with int8_group an ``Int8Activations``; with a residual (y, h), h being the sum rounded to x's
        dtype.

    Raises:
        TypeError: a dtype other than fp32, bf16, fp16, or one that differs from x's. ValueError: a shape, eps, rounding or
        int8_group.

    Numerics: sums in fp32; each row's bits do not depend on the batch or on the number of threads. What int8_group rounds is y as
    rounded to x's dtype: the integers are those of ``quant_matmul(y, w, activations="int8")``. Gradients to x, weight and residual;
    with int8_group none.
    Cost: 2 (3 with a residual, 4 with both results) times the bytes of x; 4 flops an element. With int8_group y has K + 8 G bytes a
    row, G = ceil(K / int8_group).
    Source: Zhang and Sennrich 2019, arXiv:1910.07467; transformers' LlamaRMSNorm and GemmaRMSNorm for the rounding.
    """
    args = _prepare(x, weight, eps, residual=residual, offset=offset, rounding=rounding, int8_group=int8_group)
    if int8_group is None:
        return _plain(*args) if residual is None else _with_residual(*args)
    data, groups, *h = _int8(*args) if residual is None else _with_residual_int8(*args)
    y = Int8Activations(data, groups, args[-1], x.dtype)
    return (y, *h) if h else y
