"""Heads, hidden states and PyTorch's own way, for tests, verify and bench."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from ...quant.activations import activation_group
from ...quant.tensor import QuantizedTensor
from .._case import Case, OpCases
from ..quant_matmul.cases import random_weight
from ..quant_matmul.reference import round_activations
from . import reference
from .api import cross_entropy


def torch_cross_entropy(
    hidden: Tensor,
    weight: Tensor | QuantizedTensor,
    target: Tensor,
    *,
    softcap: float | None = None,
    ignore_index: int = -100,
    activations: str = "float",
    reduction: str = "none",
) -> Tensor:
    """What transformers' models do: all logits in the working dtype, widened for the loss.

    A weight that is dense already is `bench`'s: the float head that a quantised one replaces, which rounds nothing.
    """
    if isinstance(weight, QuantizedTensor):
        if activations == "int8":
            hidden = round_activations(hidden, activation_group(weight.group_size), torch.float32).to(hidden.dtype)
        weight = weight.dequantize(hidden.dtype)
    logits = hidden @ weight.T
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    rows = logits.float().view(-1, logits.shape[-1])
    loss = torch.nn.functional.cross_entropy(rows, target.flatten(), ignore_index=ignore_index, reduction=reduction)
    return loss.view(target.shape) if reduction == "none" else loss


def _dense(inputs: dict[str, Any]) -> dict[str, Any]:
    w = inputs["weight"]
    return {**inputs, "weight": w.dequantize(inputs["hidden"].dtype) if isinstance(w, QuantizedTensor) else w}


def _inputs(
    rows: int | tuple[int, ...],
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    quantized: tuple[int, int, str] | None = None,
    spread: float = 3.0,
    mean: float = 0.0,
    ignored: float = 0.0,
    infinite: bool = False,
    strided: bool = False,
    **options: Any,
) -> Callable[[Generator], dict[str, Any]]:
    """spread: standard deviation of float logits, mean: theirs; ignored: share of the targets; infinite: some logits are."""

    def make(g: Generator) -> dict[str, Any]:
        shape = (rows,) if isinstance(rows, int) else rows
        hidden = torch.randn(*shape, k, generator=g)
        target = torch.randint(n, shape, generator=g)
        weight: Any
        if quantized is None:
            weight = torch.randn(n, k, generator=g) * (spread / k**0.5)
            if mean:
                hidden[..., 0], weight[:, 0] = 1.0, mean
            if infinite:  # the sign of the first column decides over the logits of three rows of the weight
                hidden[..., 0] = torch.where(torch.arange(shape[-1]) % 2 == 0, 1.0, -1.0)
                weight[:, 0] = 0.0
                weight[n // 2, 0] = -torch.inf
                weight[-2:, 0] = -torch.inf
                target[..., :3] = n // 2
            weight = weight.to(dtype)
        else:
            bits, group_size, form = quantized
            weight = random_weight(g, n, k, bits, group_size, form)
        hidden = hidden.to(dtype)
        if strided:  # every other row of a larger buffer
            hidden = torch.stack([hidden, hidden.flip(-1)], -2)[..., 0, :]
        target[torch.rand(shape, generator=g) < ignored] = options.get("ignore_index", -100)
        return {"hidden": hidden, "weight": weight, "target": target, **options}

    return make


_Q8_0 = (8, 32, "zero")
_Q4_1 = (4, 32, "minimum")


def _cases() -> list[Case]:
    cases = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):

        def add(
            name: str,
            rows: int | tuple[int, ...],
            n: int,
            k: int,
            _dtype: torch.dtype = dtype,
            bench: bool = False,
            **options: Any,
        ) -> None:
            quantized = options.get("quantized")
            m = torch.Size([rows] if isinstance(rows, int) else rows).numel()
            held, arithmetic = n * k * _dtype.itemsize, "fp32"
            if quantized is not None:
                bits, group_size, form = quantized
                held = n * k * bits // 8 + n * (1 if group_size == -1 else k // group_size) * (2 if form == "zero" else 4)
                arithmetic = f"int{bits}" if options.get("activations") == "int8" else "fp32"
            size = held + m * (k * _dtype.itemsize + 8 + 4)
            make = _inputs(rows, n, k, _dtype, **options)
            by_torch = "" if quantized else "on the CPU, the product with a float weight is PyTorch's own"
            cases.append(Case(name, _dtype, make, size, 2 * m * n * k, bench, arithmetic=arithmetic, by_torch=by_torch))

        if dtype != torch.float16:  # seconds of PyTorch's time each, and nothing in them that bf16 has not got
            add("smollm2-135m head 512x49152x576", 512, 49152, 576, bench=True)
        for activations in ("float", "int8"):
            how = f"{activations} activations"
            if dtype != torch.float16:
                title = f"smollm2-135m head 512x49152x576 int8 g32 {how}"
                add(title, 512, 49152, 576, quantized=_Q8_0, activations=activations, bench=True)
            add(f"int8 g32 9x777x96 {how}", 9, 777, 96, quantized=_Q8_0, activations=activations)
            add(f"int4 g32 minimum 2x3x1030x64 {how}", (2, 3), 1030, 64, quantized=_Q4_1, activations=activations)
        add("one token, int4 g32 1x16389x256", 1, 16389, 256, quantized=_Q4_1)
        add("llama head, small 33x2000x64", 33, 2000, 64)
        add("several stretches and blocks of rows 1100x2100x16", 1100, 2100, 16, ignored=0.2)
        add("several stretches, int8 rows 1100x2100x16", 1100, 2100, 16, quantized=(8, -1, "zero"))
        add("long vocabulary 5x33000x3", 5, 33000, 3)
        add("long vocabulary, int8 g32 3x9000x32", 3, 9000, 32, quantized=_Q8_0)
        add("long rows, 16-bit weights are widened in parts 2x2077x3000", 2, 2077, 3000)
        add("odd 3x5x131x37", (3, 5), 131, 37, ignored=0.3)
        add("one token 1x1027x64", 1, 1027, 64)
        add("one vector 257x48", (), 257, 48)
        add("vocabulary of one 4x1x8", 4, 1, 8)
        add("vocabulary of seventeen 5x17x3", 5, 17, 3)
        add("all ignored 6x100x32", 6, 100, 32, ignored=1.0)
        add("a known token is ignored 40x4x16", 40, 4, 16, ignored=0.2, ignore_index=2)
        add("no tokens 0x100x32", 0, 100, 32)
        add("strided 7x200x40", 7, 200, 40, strided=True)
        add("softcap 12x300x64", 12, 300, 64, softcap=5.0)
        add("softcap over one vector 12x1024x64 int8 g64", 12, 1024, 64, softcap=2.0, quantized=(8, 64, "zero"))
        add("huge logits 9x300x64", 9, 300, 64, spread=3000.0)
        add("all logits near 10000 9x300x64", 9, 300, 64, mean=1e4)
        add("all logits near -10000 9x1300x64", 9, 1300, 64, mean=-1e4)
        add("logits of -inf and +inf 8x1100x33", 8, 1100, 33, infinite=True)
        add("mean 30x150x48", 30, 150, 48, ignored=0.4, reduction="mean")
        add("sum 2x15x150x48", (2, 15), 150, 48, ignored=0.4, reduction="sum")
    return cases


def _wrong(change: Callable[[dict[str, Any]], None]) -> Callable[..., Tensor]:
    """The reference on arguments that were changed."""

    def call(**inputs: Any) -> Tensor:
        change(inputs)
        return reference.cross_entropy(**inputs)

    return call


def _float(inputs: dict[str, Any]) -> Tensor:
    w = inputs["weight"]
    return w.dequantize(torch.float64) if isinstance(w, QuantizedTensor) else w


def _target_off_by_one(inputs: dict[str, Any]) -> None:
    kept = inputs["target"] == inputs.get("ignore_index", -100)
    inputs["target"] = torch.where(kept, inputs["target"], (inputs["target"] + 1) % inputs["weight"].shape[0])


def _nothing_ignored(inputs: dict[str, Any]) -> None:
    inputs["target"] = inputs["target"].clamp(min=0)
    inputs["ignore_index"] = -100


def _last_column_dropped(inputs: dict[str, Any]) -> None:
    inputs["hidden"] = inputs["hidden"].clone()
    inputs["hidden"][..., -1] = 0


def _logits_rounded(inputs: dict[str, Any]) -> None:
    """As if they were held in fp16: an identity in place of the weight keeps them as they are after that."""
    logits = (inputs["hidden"] @ _float(inputs).T).half().double()
    inputs |= {"hidden": logits, "weight": torch.eye(logits.shape[-1], dtype=torch.float64), "activations": "float"}


def _last_token_not_in_the_sum(inputs: dict[str, Any]) -> None:
    weight = _float(inputs)
    if not bool((inputs["target"] == len(weight) - 1).any()) and len(weight) > 1:
        inputs["weight"] = weight[:-1]


def _first_row_twice(inputs: dict[str, Any]) -> None:
    weight = _float(inputs)
    inputs["weight"] = torch.cat([weight, weight[:1]])


def _other_sum(log_sum: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The reference with another log of the sum of exponentials."""

    def call(**inputs: Any) -> Tensor:
        z, softcap = inputs["hidden"] @ _float(inputs).T, inputs.get("softcap")
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        ignore_index, target = inputs.get("ignore_index", -100), inputs["target"]
        loss = reference.cross_entropy(**inputs | {"reduction": "none"}) - z.logsumexp(-1) + log_sum(z)
        loss = loss.masked_fill(target == ignore_index, 0.0)
        return reference.reduced(loss, target, ignore_index, inputs.get("reduction", "none"))

    return call


def _uncorrected(z: Tensor) -> Tensor:
    """Online softmax over two halves of the vocabulary; the first half's sum is not scaled to the new maximum."""
    if z.shape[-1] == 1 or z.numel() == 0:
        return z.logsumexp(-1)
    first, second = z.tensor_split(2, -1)
    top = z.amax(-1, keepdim=True)
    total = torch.exp(first - first.amax(-1, keepdim=True)).sum(-1) + torch.exp(second - top).sum(-1)
    return total.log() + top.squeeze(-1)


def _mean_over_all(**inputs: Any) -> Tensor:
    loss = reference.cross_entropy(**inputs | {"reduction": "none"})
    kind = inputs.get("reduction", "none")
    return loss.mean() if kind == "mean" else reference.reduced(loss, inputs["target"], -100, kind)


CASES = OpCases(
    op="cross_entropy",
    call=cross_entropy,
    reference=reference.cross_entropy,
    torch=torch_cross_entropy,
    rival="F.cross_entropy on all logits, of a weight dequantised beforehand",
    held_by_torch=_dense,
    cases=_cases(),
    compute_bound=lambda case: case.flops >= 16 * case.bytes,
    mutants={
        "the next token is the target": _wrong(_target_off_by_one),
        "nothing is ignored": _wrong(_nothing_ignored),
        "softcap is left out": _wrong(lambda inputs: inputs.pop("softcap", None)),
        "last column of hidden is dropped": _wrong(_last_column_dropped),
        "logits are rounded to 16 bits": _wrong(_logits_rounded),
        "the last token is not in the sum": _wrong(_last_token_not_in_the_sum),
        "the first token is twice in the sum": _wrong(_first_row_twice),
        "the maximum is not subtracted": _other_sum(lambda z: z.exp().sum(-1).log()),
        "the running sum is not corrected": _other_sum(_uncorrected),
        "the mean counts ignored tokens": _mean_over_all,
        "activations are not quantised": _wrong(lambda inputs: inputs.update(activations="float")),
        "the loss is a sum where the mean is wanted": _wrong(
            lambda inputs: inputs.update(reduction="none" if inputs.get("reduction", "none") == "none" else "sum")
        ),
    },
)
