"""The ops: one folder each, the same files in each. ``CONTRIBUTING.md`` tells how to add one."""

from .quant_matmul import quant_matmul
from .rms_norm import rms_norm

__all__ = ["quant_matmul", "rms_norm"]
