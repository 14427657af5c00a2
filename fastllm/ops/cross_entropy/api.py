"""The public function: checks, schema, fake, and which backends serve."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...backends import Backend
from ...errors import dtype_error, type_error, value_error
from ...quant.tensor import QuantizedTensor
from .. import _check, _op, _triton
from ..quant_matmul.api import packed
from . import native, reference


def _prepare(
    hidden: Tensor,
    weight: Tensor | QuantizedTensor,
    target: Tensor,
    *,
    softcap: float | None = None,
    ignore_index: int = -100,
    activations: str = "float",
) -> tuple[Any, ...]:
    _check.floating("cross_entropy", "hidden", hidden, min_dim=1)
    if not isinstance(weight, (Tensor, QuantizedTensor)):
        raise type_error("cross_entropy", "weight", weight, "a torch.Tensor or a QuantizedTensor")
    _check_weight(hidden, weight)
    _check.tensor("cross_entropy", "target", target)
    if target.dtype != torch.int64:
        raise dtype_error("cross_entropy", "target", target.dtype, "torch.int64")
    if target.shape != hidden.shape[:-1]:
        because = f"to match the rows of hidden {tuple(hidden.shape)}"
        raise _check.shape_error("cross_entropy", "target", target.shape, f"{tuple(hidden.shape[:-1])}", because)
    if target.device != hidden.device:
        raise ValueError(f"cross_entropy: target is on {target.device}, expected {hidden.device} to match hidden")
    if softcap is not None:
        _check.number("cross_entropy", "softcap", softcap)
        if not (softcap > 0.0 and math.isfinite(softcap)):
            raise value_error("cross_entropy", "softcap", softcap, "None or a finite number above 0")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise type_error("cross_entropy", "ignore_index", ignore_index, "an int")
    if activations not in ("float", "int8"):
        raise value_error("cross_entropy", "activations", activations, "'float' or 'int8'")
    last = float(softcap or 0.0), ignore_index
    n, k = weight.shape
    if isinstance(weight, Tensor):
        return hidden, weight, None, None, target, n, k, 0, 0, 0, "", False, *last
    w = weight if weight.layout == "x16" or torch.compiler.is_compiling() else packed(weight)
    form = n, k, w.bits, w.group_size, w.zero, w.layout
    return hidden, w.data, w.scale, w.minimum, target, *form, activations == "int8", *last


def _check_weight(hidden: Tensor, weight: Tensor | QuantizedTensor) -> None:
    if isinstance(weight, Tensor):
        _check.like("cross_entropy", "weight", weight, hidden.dtype, hidden.device, of="hidden")
        if weight.dim() != 2 or weight.numel() == 0:
            raise _check.shape_error("cross_entropy", "weight", weight.shape, "(V, K), each at least 1")
    elif weight.data.device != hidden.device:
        raise ValueError(f"cross_entropy: weight is on {weight.data.device}, expected {hidden.device} to match hidden")
    k = weight.shape[1]
    if hidden.shape[-1] != k:
        because = f"to match weight {tuple(weight.shape)}"
        raise _check.shape_error("cross_entropy", "hidden", hidden.shape, f"(..., {k})", because)


def _reference(
    hidden: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    minimum: Tensor | None,
    target: Tensor,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    zero: int,
    layout: str,
    int8_activations: bool,
    softcap: float,
    ignore_index: int,
) -> Tensor:
    w = weight if scale is None else QuantizedTensor(weight, scale, minimum, zero, (n, k), bits, group_size, layout)
    activations = "int8" if int8_activations else "float"
    return reference.cross_entropy(
        hidden, w, target, softcap=softcap or None, ignore_index=ignore_index, activations=activations
    )


def _fake(hidden: Tensor, weight: Tensor, scale: Tensor | None, minimum: Tensor | None, target: Tensor, *_: object) -> Tensor:
    return hidden.new_empty(target.shape, dtype=torch.float32)


_cross_entropy = _op.Op(
    "cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor? scale, Tensor? minimum, Tensor target, SymInt n, SymInt k, int bits, "
    "int group_size, int zero, str layout, bool int8_activations, float softcap, int ignore_index) -> Tensor",
    fake=_fake,
    backends=(
        Backend(
            "cpu",
            native.cross_entropy,
            native.refuse,
            note="logits come from PyTorch's own product for a float weight, from quant_matmul's for a quantised one",
        ),
        _triton.backend(
            __package__, "cross_entropy", note="one kernel for a float weight; logits of a quantised one are quant_matmul's"
        ),
        Backend("reference", _reference, _check.never_refuse),
    ),
    prepare=_prepare,
    no_gradient="it keeps no logits to differentiate",
)


def cross_entropy(
    hidden: Tensor,
    weight: Tensor | QuantizedTensor,
    target: Tensor,
    *,
    softcap: float | None = None,
    ignore_index: int = -100,
    activations: str = "float",
    reduction: str = "none",
) -> Tensor:
    """Negative log-likelihood of each target under a language model's head, without ever holding the logits.

    loss[m] = log(sum_v exp(z[m, v])) - z[m, target[m]];  z[m, v] = cap(sum_k hidden[m, k] weight[v, k]),
    cap(x) = softcap tanh(x / softcap)

    Args:
        hidden: (..., K) fp32|bf16|fp16.
        weight: (V, K) of hidden's dtype, or quantised (4 or 8 bits; kernels read its "x16" layout, see ``quant_matmul``).
        target: (...) int64, from 0 to V - 1, or ignore_index.
        softcap: bounds the logits to (-softcap, softcap), in their units.
        ignore_index: the target whose loss is 0.
        activations: how a quantised weight sees hidden, "float" or "int8" (``quant_matmul``); a float weight sees it as it is.
        reduction: "none", "sum", or "mean" over the targets that are not ignored (NaN where all are).

    Returns:
        fp32, in nats: (...) or, reduced, a scalar.

    Raises:
        TypeError: a dtype or a non-tensor. ValueError: a shape, a device, a range; a target that is neither a row of weight nor
        ignore_index, before anything is computed. On a GPU, where asking would wait for it, and in Triton's interpreter,
        which does what the GPU does, the loss of such a target is NaN.

    Numerics: logits are fp32, also of 16-bit arguments; exponentials are summed in fp32 runs, and runs, on the CPU, in fp64.
    A logit of +inf makes the loss +inf (its own NaN), a target's of -inf +inf; NaN stays NaN. On the CPU the bits do not depend
    on the number of threads, nor, with a quantised weight, on the other rows; as far as PyTorch's product holds to that,
    where the weight is float. No gradient.
    Cost: bytes of hidden, weight and target; 2 M V K operations and M V exponentials. On the CPU the product is not ours for a
    float weight: it is PyTorch's in fp32, up to 512 rows by a stretch of the vocabulary at a time; a quantised weight's is
    quant_matmul's. In place of M V logits there are 4 MiB of them, hidden in fp32, and 16 MiB or 1024 rows of a 16-bit weight
    in fp32. On GPUs a float weight takes one kernel that keeps logits in registers, a quantised one 16 MiB of logits.
    Source: the loss of every language model; Milakov and Gimelshein 2018, arXiv:1805.02867 (online softmax); Wijmans et al.
    2024, arXiv:2411.09009 (its fusion with the projection).
    """
    if reduction not in ("none", "mean", "sum"):
        raise value_error("cross_entropy", "reduction", reduction, "'none', 'mean' or 'sum'")
    args = _prepare(hidden, weight, target, softcap=softcap, ignore_index=ignore_index, activations=activations)
    return reference.reduced(_cross_entropy(*args), target, ignore_index, reduction)
