"""fastllm: custom fused kernels for LLaMA-family models in PyTorch."""

from .backends import info, use_backend
from .integrations.transformers import accelerate
from .ops import apply_rotary, apply_rotary_cache, gated_activation, quant_matmul, rms_norm
from .ops._explain import explain
from .quant import quantize

__all__ = [
    "accelerate",
    "apply_rotary",
    "apply_rotary_cache",
    "explain",
    "gated_activation",
    "info",
    "quant_matmul",
    "quantize",
    "rms_norm",
    "use_backend",
]
