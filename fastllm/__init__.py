"""fastllm: custom fused kernels for LLaMA-family models in PyTorch."""

from .backends import info, use_backend
from .ops import attention, rms_norm
from .ops._explain import explain

__all__ = ["attention", "explain", "info", "rms_norm", "use_backend"]
