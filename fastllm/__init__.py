"""fastllm: custom fused kernels for LLaMA-family models in PyTorch."""

from .backends import info, use_backend
from .ops import apply_rotary, apply_rotary_cache, gated_activation, rms_norm

__all__ = ["apply_rotary", "apply_rotary_cache", "gated_activation", "info", "rms_norm", "use_backend"]
