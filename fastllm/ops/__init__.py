"""The ops: one folder each, the same files in each. ``CONTRIBUTING.md`` tells how to add one."""

from .attention import attention
from .cross_entropy import cross_entropy
from .embedding import embedding
from .gated_activation import gated_activation
from .quant_matmul import quant_matmul
from .rms_norm import rms_norm
from .rotary import apply_rotary, apply_rotary_cache

__all__ = [
    "apply_rotary",
    "apply_rotary_cache",
    "attention",
    "cross_entropy",
    "embedding",
    "gated_activation",
    "quant_matmul",
    "rms_norm",
]
