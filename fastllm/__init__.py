"""fastllm: custom fused kernels for LLaMA-family models in PyTorch."""

from .backends import info, use_backend
from .integrations.transformers import accelerate
from .models import load
from .ops import (
    apply_rotary,
    apply_rotary_cache,
    attention,
    cross_entropy,
    embedding,
    gated_activation,
    quant_matmul,
    rms_norm,
)
from .ops._explain import explain
from .quant import Int8Activations, quantize

__all__ = [
    "Int8Activations",
    "accelerate",
    "apply_rotary",
    "apply_rotary_cache",
    "attention",
    "cross_entropy",
    "embedding",
    "explain",
    "gated_activation",
    "info",
    "load",
    "quant_matmul",
    "quantize",
    "rms_norm",
    "use_backend",
]
