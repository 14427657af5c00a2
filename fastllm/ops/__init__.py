"""The ops: one folder each, the same files in each. ``CONTRIBUTING.md`` tells how to add one."""

from .attention import attention
from .rms_norm import rms_norm

__all__ = ["attention", "rms_norm"]
