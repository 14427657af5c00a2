"""Kernels to be beaten besides PyTorch's plain way: those it would choose among by itself, and other libraries'.

Each takes the keyword arguments of the op's cases. One that is not installed is left out; one that refuses a case is too, with its
reason in the row's note.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["others"]


def others(op: str, device: str) -> dict[str, Callable[..., Any]]:
    """By name; nothing on a CPU, where ``benchmarks/`` has the rivals in environments of their own."""
    if device != "cuda":
        return {}
    found: dict[str, Callable[..., Any]] = {}
    if op == "attention":
        found |= {"sdpa flash": _sdpa("FLASH_ATTENTION"), "sdpa cudnn": _sdpa("CUDNN_ATTENTION")}
    if importlib.util.find_spec("liger_kernel") is not None and op in _LIGER:
        found["liger"] = _LIGER[op]
    return found


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
