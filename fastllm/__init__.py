"""fastllm: custom fused kernels for LLaMA-family models in PyTorch."""

from .backends import info, use_backend
from .ops import rms_norm

__all__ = ["info", "rms_norm", "use_backend"]
