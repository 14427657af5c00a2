from .api import gated_activation

__all__ = ["gated_activation"]
