from .api import cross_entropy

__all__ = ["cross_entropy"]
