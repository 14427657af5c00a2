"""A Hugging Face directory: config.json, safetensors in one file or in shards, tokenizer.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastllm.errors import dtype_error, type_error, value_error
from fastllm.models.loaders.config import ModelConfig, brief, config_from_hf
from fastllm.models.loaders.weights import TensorMap, check_shapes, expected_shapes, missing_file

__all__ = ["open_hf", "read_json"]

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Buffers that old checkpoints carry and that follow from the config.
DERIVED = re.compile(r"(model\.layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)|model\.rotary_emb\..*")


def open_hf(path: Path) -> tuple[ModelConfig, TensorMap]:
    """Read the config and every shard's header, and check one against the other; no weight is read yet."""
    generation_path = path / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else None
    config = config_from_hf(read_json(path / "config.json"), generation)
    expected = expected_shapes(config)
    files = _shards(path)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(set(files.values())):
        for name, shape, dtype in _headers(file):
            if files.get(name, file) != file or DERIVED.fullmatch(name):
                continue
            if name == "lm_head.weight" and config.tie_embeddings:
                continue  # a copy of the embedding, which transformers ignores too
            if dtype not in DTYPES:
                raise value_error("read_checkpoint", f"dtype of {name} in {file}", dtype, " or ".join(DTYPES))
            shapes[name] = shape
            files[name] = file
    for name, file in files.items():
        if name in expected and name not in shapes:
            raise value_error("read_checkpoint", f"{name} in {file}", "missing", "a tensor", "the index points there")
    check_shapes(path, expected, shapes, {name: f"{name} of {file.name}" for name, file in files.items()})

    def read(name: str, start: int, stop: int) -> Tensor:
        return _read_rows(files[name], name, expected[name], start, stop)

    return config, TensorMap(expected, read)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    op = "read_checkpoint"
    if not path.is_file():
        raise missing_file(path.name, path)
    try:
        value = json.loads(path.read_bytes())
    except RecursionError:
        raise value_error(op, str(path), "nested too deeply", "JSON") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError and integers beyond Python's digit limit
        raise value_error(op, str(path), brief(str(error)), "JSON") from None
    if not isinstance(value, dict):
        raise type_error(op, str(path), value, "a JSON object")
    return value


def _shards(path: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index; with one file alone, every name it holds."""
    op = "read_checkpoint"
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise missing_file("model.safetensors", single, "or model.safetensors.index.json and its shards")
        return {name: single for name, _, _ in _headers(single)}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise type_error(op, f"weight_map in {index}", weight_map, "an object of tensor names and files")
    files: dict[str, Path] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise value_error(op, f"file of {brief(name)} in {index}", brief(file), "the name of a file beside the index")
        files[name] = path / file
        if not files[name].is_file():
            raise missing_file(f"the shard of {brief(name)}", files[name])
    return files


def _headers(file: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of every tensor in a file."""
    try:
        with safe_open(file, framework="pt") as handle:
            parts = [(name, handle.get_slice(name)) for name in handle.keys()]  # noqa: SIM118 not a dict
            return [(name, tuple(part.get_shape()), part.get_dtype()) for name, part in parts]
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from None


def _read_rows(file: Path, name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
    """In memory of their own: the file's mapping ends here, so its pages leave the process with it."""
    if not file.is_file():
        raise missing_file(f"the file of {name}", file)
    try:
        with safe_open(file, framework="pt") as handle:
            stored = handle.get_slice(name)
            found = tuple(stored.get_shape())
            if found != shape:
                raise value_error("read_checkpoint", f"shape of {name} in {file}", found, f"{shape}, as at opening")
            tensor: Tensor = stored[start:stop].clone()
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from None
    if tensor.dtype not in DTYPES.values():
        raise dtype_error("read_checkpoint", f"{name} in {file}", tensor.dtype, " or ".join(DTYPES))
    return tensor


def _unreadable(file: Path, error: Exception) -> ValueError:
    return value_error("read_checkpoint", str(file), brief(str(error)), "a whole safetensors file")
