"""The thin LLaMA, its loaders and its tokenizer."""

from .loading import load
from .model import LanguageModel

__all__ = ["LanguageModel", "load"]
