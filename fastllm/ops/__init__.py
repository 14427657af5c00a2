"""The ops: one folder each, the same files in each. ``CONTRIBUTING.md`` tells how to add one."""

from .rms_norm import rms_norm

__all__ = ["rms_norm"]
