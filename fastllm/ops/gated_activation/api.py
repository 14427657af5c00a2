"""The public function: checks, schema, fake, gradient, and which backends serve."""

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

# transformers' names and ours
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_tanh": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def _prepare(
    gate: Tensor, up: Tensor | None = None, activation: str = "silu", *, int8_group: int | None = None
) -> tuple[Any, ...]:
    op = "gated_activation"
    _check.floating(op, "gate", gate, min_dim=1)
    if up is None:
        if gate.shape[-1] % 2:
            raise _check.shape_error(op, "gate", gate.shape, "an even last dim", "because without up its rows are [gate | up]")
    else:
        _check.like(op, "up", up, gate.dtype, gate.device, "gate")
        if up.shape != gate.shape:
            raise _check.shape_error(op, "up", up.shape, f"{tuple(gate.shape)}", "to match gate")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise value_error(op, "activation", activation, "one of " + ", ".join(map(repr, _ACTIVATIONS)))
    args = gate, up, _ACTIVATIONS[activation]
    return args if int8_group is None else (*args, _check.int8_group(op, int8_group))


def _reference(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    y: Tensor = reference.gated_activation(gate, up, activation).contiguous()
    return y


def _reference_int8(gate: Tensor, up: Tensor | None, activation: str, group_size: int) -> tuple[Tensor, Tensor]:
    rounded = Int8Activations.of(_reference(gate, up, activation), group_size)
    return rounded.data, rounded.groups


def _fake(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    *rows, last = gate.shape
    return gate.new_empty((*rows, last if up is not None else last // 2))


def _fake_int8(gate: Tensor, up: Tensor | None, activation: str, group_size: int) -> tuple[Tensor, Tensor]:
    *rows, last = gate.shape
    columns = last if up is not None else last // 2
    groups = gate.new_empty((*rows, -(-columns // group_size), 2), dtype=torch.float32)
    return gate.new_empty((*rows, columns), dtype=torch.int8), groups


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """y = g s(z) u, where s is the sigmoid, z = g (silu) or 2 sqrt(2/pi) (g + 0.044715 g^3) (gelu_tanh).

    d/du = g s(z); d/dg = u s(z) (1 + s(-z) g dz/dg).
    """
    gate, up = ctx.saved_tensors
    fused = up is None
    g, u = (t.float() for t in (gate.chunk(2, -1) if fused else (gate, up)))
    if ctx.activation == "silu":
        z, bend = g, g
    else:
        c, near = 2 * math.sqrt(2 / math.pi), g.clamp(-20, 20)  # beyond, s is 0 or 1, and g^3 may be infinite
        z, bend = c * (near + 0.044715 * near**3), c * (near + 3 * 0.044715 * near**3)
    s, rest = torch.sigmoid(z), torch.sigmoid(-z)  # 1 - s would lose its digits where s is near 1
    # Products in an order in which nothing overflows that need not: s may be 0 where g is huge.
    wide = grad.float()
    grad_gate = (wide * (u * (s * (1 + rest * bend)))).to(gate.dtype)
    grad_up = (wide * (g * s)).to(gate.dtype)
    if fused:
        return torch.cat((grad_gate, grad_up), -1), None, None
    return grad_gate, grad_up, None


_gated = _op.Op(
    "gated_activation",
    "(Tensor gate, Tensor? up, str activation) -> Tensor",
    fake=_fake,
    backends=(
        Backend("cpu", native.gated_activation, native.refuse),
        Backend("cuda", cuda.gated_activation, cuda.refuse),
        _triton.backend(__package__, "gated_activation"),
        Backend("reference", _reference, _check.never_refuse),
    ),
    prepare=_prepare,
    backward=(_setup_context, _backward),
)
_int8 = _op.Op(
    "gated_activation_int8",
    "(Tensor gate, Tensor? up, str activation, int group_size) -> (Tensor, Tensor)",
    fake=_fake_int8,
    backends=(
        Backend("cpu", native.gated_activation_int8, native.refuse),
        Backend("cuda", cuda.gated_activation_int8, cuda.refuse_int8),
        _triton.backend(__package__, "gated_activation_int8"),
        Backend("reference", _reference_int8, _check.never_refuse),
    ),
    prepare=_prepare,
    no_gradient="integers have none",
    instead="call gated_activation without int8_group and quant_matmul(..., activations='int8') on its result, "
    "which passes gradients straight through rounding",
)


def gated_activation(gate: Tensor, up: Tensor | None = None, activation: str = "silu", *, int8_group: int | None = None) -> Any:
    """The middle of a gated MLP: an activation of one projection times another.

    h = act(gate) * up;  silu(g) = g / (1 + e^-g);  gelu_tanh(g) = g/2 (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3)))

    Args:
        gate: (..., I) fp32|bf16|fp16, rows may be strided; or, without up, (..., 2 I): gate and up side by side.
        up: (..., I) of gate's dtype, or None.
        activation: "silu" (also "swish"), or "gelu_tanh" (also transformers' "gelu_pytorch_tanh").
        int8_group: 32, 64 or 128: h comes in int8, with a scale for so many columns, as ``quant_matmul`` takes it
            (``fastllm.quant.activation_group(w.group_size)``).

    Returns:
        h (..., I) of gate's dtype, contiguous; with int8_group an ``Int8Activations``.

    Raises:
        TypeError: a dtype. ValueError: a shape, an unknown activation or int8_group.

    Numerics: fp32 arithmetic, rounded once (LLaMA in PyTorch rounds act(gate) to gate's dtype before it multiplies). The
    bits of a row do not depend on the batch or on the number of threads. What int8_group rounds is h as rounded to gate's dtype: the
    integers are those of ``quant_matmul(h, w, activations="int8")``. Gradients to gate and up; with int8_group none.
    Cost: 3 I elements moved a row; about 25 flops an element. With int8_group h has I + 8 G bytes a row, G = ceil(I / int8_group).
    Source: Shazeer 2020, arXiv:2002.05202 (SwiGLU, GEGLU); Hendrycks and Gimpel 2016, arXiv:1606.08415 (gelu's tanh form).
    """
    args = _prepare(gate, up, activation, int8_group=int8_group)
    if int8_group is None:
        return _gated(*args)
    data, groups = _int8(*args)
    return Int8Activations(data, groups, args[-1], gate.dtype)
