"""Readers of checkpoints: Hugging Face directories and GGUF files."""

from fastllm.models.loaders.checkpoint import Checkpoint, read_checkpoint
from fastllm.models.loaders.config import ModelConfig
from fastllm.models.loaders.weights import TensorMap, expected_shapes

__all__ = ["Checkpoint", "ModelConfig", "TensorMap", "expected_shapes", "read_checkpoint"]
