"""Kernels to be beaten besides PyTorch's plain way: those it would choose among by itself, and other libraries'.

One that is not installed is left out; one that refuses a case is too, with its reason in the row's note.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Other", "others"]


@dataclass(frozen=True)
class Other:
    """A rival of an op.

    Args:
        call: takes the keyword arguments of the op's cases, or what ``held`` made of them.
        held: makes what its user would hold in place of the arguments, before the clock starts; None: what PyTorch's would.
    """

    call: Callable[..., Any]
    held: Callable[[dict[str, Any]], dict[str, Any]] | None = None


def others(op: str, device: str) -> dict[str, Other]:
    """By name; nothing on a CPU, where ``benchmarks/`` has the rivals in environments of their own."""
    if device != "cuda":
        return {}
    found: dict[str, Other] = {}
    if op == "attention":
        found |= {"sdpa flash": Other(_sdpa("FLASH_ATTENTION")), "sdpa cudnn": Other(_sdpa("CUDNN_ATTENTION"))}
    if op == "quant_matmul":
        found |= {
            "torch int4pack": Other(torch_int4pack, hold_int4pack),
            "torch int8pack": Other(torch_int8pack, hold_int8),
            "torch int_mm": Other(torch_int_mm, hold_int8),
        }
    if importlib.util.find_spec("liger_kernel") is not None and op in _LIGER:
        found["liger"] = Other(_LIGER[op])
    return found


# ---------------------------------------------------------------- PyTorch's products of quantised weights


def hold_int4pack(inputs: dict[str, Any]) -> dict[str, Any]:
    """w = (q - 8) * scale + zero for groups of columns, in bf16, packed for the tensor cores: its bytes have even columns above."""
    x, w = inputs["x"], inputs["w"].unpack()
    if w.bits != 4 or w.group_size not in (32, 64, 128, 256) or x.dtype != torch.bfloat16 or "bias" in inputs:
        raise NotImplementedError("it takes 4 bits in groups, bf16 and no bias")
    if inputs["activations"] != "float":
        raise NotImplementedError("it takes float activations")
    scale = w.scale.float()
    zero = (8 - w.zero) * scale + (0.0 if w.minimum is None else w.minimum.float())
    packed = torch._convert_weight_to_int4pack((w.data << 4) | (w.data >> 4), 8)
    scales_and_zeros = torch.stack((scale, zero), -1).transpose(0, 1).to(torch.bfloat16).contiguous()  # (G, N, 2)
    return {"x": x.flatten(0, -2), "packed": packed, "group_size": w.group_size, "scales_and_zeros": scales_and_zeros}


def torch_int4pack(x: Any, packed: Any, group_size: int, scales_and_zeros: Any) -> Any:
    return torch._weight_int4pack_mm(x, packed, group_size, scales_and_zeros)


def hold_int8(inputs: dict[str, Any]) -> dict[str, Any]:
    """w = q * scale for whole rows, q signed."""
    x, w = inputs["x"], inputs["w"].unpack()
    if w.bits != 8 or w.group_size != w.shape[1] or w.minimum is not None or w.zero != 128 or "bias" in inputs:
        raise NotImplementedError("it takes symmetric int8 rows and no bias")
    q = (w.data ^ 128).view(torch.int8)
    return {"x": x.flatten(0, -2), "q": q, "scale": w.scale[:, 0].to(x.dtype), "activations": inputs["activations"]}


def torch_int8pack(x: Any, q: Any, scale: Any, activations: str) -> Any:
    if activations != "float":
        raise NotImplementedError("it takes float activations")
    return torch._weight_int8pack_mm(x, q, scale)


def torch_int_mm(x: Any, q: Any, scale: Any, activations: str) -> Any:
    """With x rounded to int8, a scale a token, as torchao's dynamic activations are; it takes more than 16 tokens."""
    if activations != "int8":
        raise NotImplementedError("it takes int8 activations")
    steps = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 127
    rounded = (x / steps).round().to(torch.int8)
    return (torch._int_mm(rounded, q.t()) * steps * scale).to(x.dtype)  # type: ignore[attr-defined]


# ---------------------------------------------------------------- SDPA's backends, Liger-Kernel


def _sdpa(backend: str) -> Callable[..., Any]:
    def call(q: Any, k: Any, v: Any, causal: bool = True, **options: Any) -> Any:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if options:
            raise NotImplementedError(f"SDPA has no {', '.join(options)}")
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=causal and q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1]
            )

    return call


def _liger_rms_norm(x: Any, weight: Any, eps: float = 1e-6, **options: Any) -> Any:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    if options:
        raise NotImplementedError(f"its rms_norm has no {', '.join(options)}")
    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def _liger_gated_activation(gate: Any, up: Any = None, activation: str = "silu") -> Any:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    if up is None or activation != "silu":
        raise NotImplementedError("its silu takes gate and up apart")
    return LigerSiLUMulFunction.apply(gate, up)


def _liger_rotary(q: Any, k: Any, cos: Any, sin: Any, interleaved: bool = False) -> Any:
    from liger_kernel.ops.rope import LigerRopeFunction

    if interleaved or cos.shape[-1] != q.shape[-1]:
        raise NotImplementedError("its rotary turns halves of whole heads")
    return LigerRopeFunction.apply(q, k, cos, sin)


_LIGER: dict[str, Callable[..., Any]] = {
    "rms_norm": _liger_rms_norm,
    "gated_activation": _liger_gated_activation,
    "apply_rotary": _liger_rotary,
}
