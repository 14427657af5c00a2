"""One door for every kind of checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fastllm.errors import type_error, value_error
from fastllm.models.loaders.config import ModelConfig
from fastllm.models.loaders.gguf import open_gguf, parse_gguf
from fastllm.models.loaders.hf import open_hf, read_json
from fastllm.models.loaders.weights import TensorMap, missing_file
from fastllm.models.tokenizer import Tokenizer, tokenizer_from_gguf, tokenizer_from_hf

__all__ = ["Checkpoint", "read_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: its config, its tensors under Hugging Face names, its tokenizer.

    ``tensors[name]`` reads one tensor from the file, a torch.Tensor in the dtype in which it is stored or a
    QuantizedTensor with the stored integers and scales; nothing is kept, so that peak memory is what the caller keeps.
    ``lm_head.weight`` is absent where ``config.tie_embeddings``.
    """

    path: Path
    config: ModelConfig
    tensors: TensorMap

    def tokenizer(self) -> Tokenizer:
        """Build the tokenizer that the checkpoint carries."""
        eos_ids = self.config.eos_token_ids
        if not self.path.is_dir():
            return tokenizer_from_gguf(parse_gguf(self.path).metadata, eos_ids=eos_ids, where=str(self.path))
        options_path, template_path = self.path / "tokenizer_config.json", self.path / "chat_template.jinja"
        options = read_json(options_path) if options_path.is_file() else {}
        if template_path.is_file():
            try:
                options["chat_template"] = template_path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise value_error("read_checkpoint", str(template_path), "not UTF-8", "UTF-8") from None
        tokenizer_path = self.path / "tokenizer.json"
        if not tokenizer_path.is_file():
            raise missing_file("tokenizer.json", tokenizer_path)
        return tokenizer_from_hf(tokenizer_path.read_bytes(), options, eos_ids=eos_ids, where=str(tokenizer_path))


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint: a Hugging Face directory or a GGUF file.

    Args:
        path: a directory with config.json, tokenizer.json and model.safetensors (or its index and shards); or a GGUF
            file of architecture llama, qwen2 or qwen3 with F32, F16, BF16, Q4_0, Q4_1 or Q8_0 tensors.

    Returns: a Checkpoint. Names, shapes and dtypes are checked against the config here; weights are read on access.
    Raises: FileNotFoundError for a missing file or shard; ValueError or TypeError, naming the file and the tensor, for
    an architecture or a type that is not supported, for a damaged or truncated file, or for tensors at odds with the
    config.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise type_error("read_checkpoint", "path", path, "a str or a path")
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise missing_file("the checkpoint", path, "or a directory of that name")
        if path.suffix in (".safetensors", ".json"):
            raise value_error("read_checkpoint", "path", str(path), "the directory that holds it, or a GGUF file")
    try:
        return Checkpoint(path, *(open_hf(path) if path.is_dir() else open_gguf(path)))
    except (TypeError, ValueError) as error:
        op, _, text = str(error).partition(": ")
        if op != "ModelConfig":
            raise
        raise type(error)(f"read_checkpoint: the config in {path}: {text}") from None
