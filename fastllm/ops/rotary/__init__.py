from .api import apply_rotary, apply_rotary_cache

__all__ = ["apply_rotary", "apply_rotary_cache"]
