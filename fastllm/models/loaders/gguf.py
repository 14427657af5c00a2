"""A GGUF file: its metadata, its tensors as they are stored, under Hugging Face names and in Hugging Face's row order.

The header is parsed here rather than by ``gguf.GGUFReader``: that takes 5 s for the 98 MB test model (this takes 0.2),
follows sizes in a damaged file wherever they lead, and maps the whole file, whose touched pages then count as ours.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fastllm.errors import value_error
from fastllm.models.loaders.config import ModelConfig, brief, unknown_architecture
from fastllm.models.loaders.weights import TensorMap, check_shapes, expected_shapes, missing_file
from fastllm.quant.formats import from_q4_0, from_q4_1, from_q8_0
from fastllm.quant.tensor import QuantizedTensor

__all__ = ["GGUFFile", "TensorInfo", "open_gguf", "parse_gguf"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# ggml type -> its name, weights in a block, bytes of a block
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    30: ("BF16", 1, 2),
}
OTHER_TYPES = {
    6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTIZED = {"Q4_0": from_q4_0, "Q4_1": from_q4_1, "Q8_0": from_q8_0}

MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FREQS = "rope_freqs.weight"
# Keys that would change what the model computes and that no supported architecture has.
FOREIGN_KEYS = (
    "expert_count",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: torch's order of dims, the ggml type by number, the offset from the start of the file."""

    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class GGUFFile:
    """The header of a GGUF file."""

    path: Path
    size: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def read_rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The stored bytes of a tensor's rows, (rows, bytes of a row) uint8, read once into memory of our own."""
        info = self.tensors[name]
        kind, block, block_bytes = self.layout(name)
        k = info.shape[-1]
        rows, row_bytes = math.prod(info.shape[:-1]), k // block * block_bytes
        stop = rows if stop is None else stop
        end = info.offset + stop * row_bytes
        if end > self.size:
            raise value_error(
                "read_checkpoint", f"size of {self.path}", self.size, f"at least {end}", f"{name} ({kind}) goes on to there"
            )
        raw = torch.empty((stop - start, row_bytes), dtype=torch.uint8)
        buffer = memoryview(raw.view(-1).numpy())  # type: ignore[arg-type]
        if not self.path.is_file():
            raise missing_file(f"the file of {name}", self.path)
        with open(self.path, "rb", buffering=0) as file:
            at = info.offset + start * row_bytes
            file.seek(at)
            done = 0
            while done < len(buffer):
                count = file.readinto(buffer[done:])
                if not count:
                    raise value_error("read_checkpoint", f"size of {self.path}", at + done, f"at least {end}")
                done += count
        return raw

    def layout(self, name: str) -> tuple[str, int, int]:
        """Type name, weights and bytes of a block; refuses types that are not read."""
        info = self.tensors[name]
        if info.type not in TYPES:
            kind = OTHER_TYPES.get(info.type, f"ggml type {info.type}")
            supported = ", ".join(kind for kind, _, _ in TYPES.values())
            raise value_error("read_checkpoint", f"type of {name} in {self.path}", kind, f"one of {supported}")
        kind, block, block_bytes = TYPES[info.type]
        if info.shape[-1] % block or (kind in QUANTIZED and len(info.shape) != 2):
            raise value_error(
                "read_checkpoint", f"shape of {name} in {self.path}", info.shape, f"(N, a multiple of {block})",
                f"{kind} stores rows in blocks of {block}",
            )  # fmt: skip
        return kind, block, block_bytes


def parse_gguf(path: Path) -> GGUFFile:
    """Read the header: metadata and where the tensors lie.

    Every count and length is compared with what is left of the file before anything is allocated for it.
    """
    size = path.stat().st_size
    with open(path, "rb", buffering=1 << 20) as file:
        cursor = _Cursor(file, size, path)
        if cursor.take(4) != MAGIC:
            raise value_error("read_checkpoint", f"the start of {path}", "not GGUF", "a GGUF file")
        version = cursor.number("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(int(version).to_bytes(4, "little"), "big")
            because = "the file is big-endian" if swapped in VERSIONS else ""
            raise value_error("read_checkpoint", f"GGUF version of {path}", version, "2 or 3", because)
        tensor_count, key_count = cursor.count(24), cursor.count(13)
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = cursor.string("a metadata key")
            if key in metadata:
                raise value_error("read_checkpoint", f"a metadata key of {path}", brief(key), "each key once")
            metadata[key] = cursor.value(cursor.number("I"), key)
        raw_infos = {}
        for _ in range(tensor_count):
            name = cursor.string("a tensor name")
            dims = cursor.number("I")
            if not 1 <= dims <= MAX_DIMS:
                raise value_error("read_checkpoint", f"rank of {brief(name)} in {path}", dims, f"1 to {MAX_DIMS}")
            shape = tuple(cursor.number("Q") for _ in range(dims))[::-1]  # ggml counts the fastest dim first
            if min(shape) == 0:
                raise value_error("read_checkpoint", f"shape of {brief(name)} in {path}", shape, "no dim of 0")
            if name in raw_infos:
                raise value_error("read_checkpoint", f"a tensor name of {path}", brief(name), "each name once")
            raw_infos[name] = (shape, cursor.number("I"), cursor.number("Q"))
        alignment = metadata.get("general.alignment", 32)
        if isinstance(alignment, bool) or not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise value_error("read_checkpoint", f"general.alignment of {path}", brief(alignment), "1 to 1048576")
        start = -(-cursor.position // alignment) * alignment
    tensors = {name: TensorInfo(shape, kind, start + offset) for name, (shape, kind, offset) in raw_infos.items()}
    return GGUFFile(path, size, metadata, tensors)


def open_gguf(path: Path) -> tuple[ModelConfig, TensorMap]:
    """Read the header and check it against the sizes it declares; no weight is read yet."""
    file = parse_gguf(path)
    names = _hf_names(file)  # Hugging Face name -> name in the file
    config = _config(file, names)
    expected = expected_shapes(config)
    for name in names.values():
        kind, block, block_bytes = file.layout(name)
        info = file.tensors[name]
        end = info.offset + math.prod(info.shape) // block * block_bytes
        if end > file.size:
            raise value_error("read_checkpoint", f"size of {path}", file.size, f"at least {end}", f"{name} ends there")
        if kind in QUANTIZED and len(info.shape) == 1:
            raise value_error("read_checkpoint", f"type of {name} in {path}", kind, "F32, F16 or BF16 for a vector")
    found = {name: file.tensors[stored].shape for name, stored in names.items()}
    check_shapes(path, expected, found, names)
    # What outlives this call: where the tensors lie, not the metadata with its hundred thousand strings.
    lean = GGUFFile(path, file.size, {}, {name: file.tensors[name] for name in names.values()})
    # llama.cpp's converter interleaves the two halves of each head of q and k for its rotary kernel, for "llama" alone.
    permuted = file.metadata["general.architecture"] == "llama"
    moved = {name for name in names if permuted and re.search(r"\.self_attn\.[qk]_proj\.", name)}

    def read(name: str, start: int, stop: int) -> Tensor | QuantizedTensor:
        stored, shape = names[name], expected[name]
        together = config.head_dim if name in moved else 1
        first, end = start // together * together, -(-stop // together) * together
        # A vector is one row of the file.
        vector = len(shape) == 1
        raw = lean.read_rows(stored).view(shape[0], -1)[first:end] if vector else lean.read_rows(stored, first, end)
        if name in moved:
            raw = _unpermute(raw, config.head_dim)
        raw = raw[start - first : stop - first]
        kind = lean.layout(stored)[0]
        if kind in QUANTIZED:
            return QUANTIZED[kind](raw)
        return raw.view(FLOATS[kind]).view(-1, *shape[1:])

    return config, TensorMap(expected, read)


class _Cursor:
    """Sequential reads that know how much of the file is left."""

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self.file, self.size, self.path, self.position = file, size, path, 0

    def take(self, count: int) -> bytes:
        data = self.file.read(count) if count <= self.size - self.position else b""
        if len(data) != count:
            raise value_error(
                "read_checkpoint", f"size of {self.path}", self.size, f"at least {self.position + count}",
                "the header goes on",
            )  # fmt: skip
        self.position += count
        return data

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def count(self, least: int) -> int:
        """A count of things that take ``least`` bytes each at the very least."""
        count = self.number("Q")
        if count > (self.size - self.position) // least:
            raise value_error(
                "read_checkpoint", f"a count in {self.path}", count, f"at most {(self.size - self.position) // least}",
                "no more fits the file",
            )  # fmt: skip
        return int(count)

    def string(self, what: str) -> str:
        data = self.take(self.count(1))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise value_error("read_checkpoint", f"{what} in {self.path}", brief(str(data)), "UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self.string(brief(key))
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY:
            raise value_error("read_checkpoint", f"type of {brief(key)} in {self.path}", kind, "a GGUF type, 0 to 12")
        item = self.number("I")
        if item == STRING:
            return [self.string(brief(key)) for _ in range(self.count(8))]
        if item not in SCALARS:
            raise value_error(
                "read_checkpoint", f"type of the items of {brief(key)} in {self.path}", item, "a scalar or a string"
            )
        width = struct.calcsize("<" + SCALARS[item])
        count = self.count(width)
        return list(struct.unpack(f"<{count}{SCALARS[item]}", self.take(count * width)))


def _hf_names(file: GGUFFile) -> dict[str, str]:
    """Hugging Face name -> name in the file, for every tensor but the rotary factors."""
    names: dict[str, str] = {}
    for stored in file.tensors:
        if stored == ROPE_FREQS:
            continue
        match = re.fullmatch(r"(?:blk\.(0|[1-9]\d{0,5})\.)?(\w+)\.(weight|bias)", stored, re.ASCII)
        table = MODEL_NAMES if match is None or match[1] is None else LAYER_NAMES
        if match is None or match[2] not in table:
            raise value_error("read_checkpoint", f"a tensor in {file.path}", brief(stored), "a tensor of a llama or qwen model")
        prefix = "" if match[1] is None else f"model.layers.{match[1]}."
        names[f"{prefix}{table[match[2]]}.{match[3]}"] = stored
    return names


def _config(file: GGUFFile, names: dict[str, str]) -> ModelConfig:
    """ModelConfig out of the metadata and out of which tensors there are."""
    op, path, metadata = "read_checkpoint", file.path, file.metadata
    stored_architecture = metadata.get("general.architecture")
    if stored_architecture not in ("llama", "qwen2", "qwen3"):
        raise unknown_architecture(op, f"general.architecture of {path}", stored_architecture)

    def get(key: str, default: Any = None, required: bool = False) -> Any:
        value = metadata.get(f"{stored_architecture}.{key}", default)
        if value is None and required:
            raise value_error(op, f"{stored_architecture}.{key} of {path}", None, "a value")
        return value

    for key in FOREIGN_KEYS:
        if get(key):
            raise value_error(op, f"{stored_architecture}.{key} of {path}", brief(get(key)), "none", "it is not supported")
    hidden_size, num_heads = get("embedding_length", required=True), get("attention.head_count", required=True)
    num_layers = get("block_count", required=True)
    head_dim = get("attention.key_length")
    if head_dim is None and isinstance(hidden_size, int) and isinstance(num_heads, int) and num_heads > 0:
        head_dim = hidden_size // num_heads
    if get("attention.value_length", head_dim) != head_dim:
        raise value_error(
            op, f"{stored_architecture}.attention.value_length of {path}", brief(get("attention.value_length")),
            f"{brief(head_dim)}, the key length",
        )  # fmt: skip
    window = get("attention.sliding_window") or None
    embedding = file.tensors.get("token_embd.weight")
    vocab_size = get("vocab_size")
    if vocab_size is None and embedding is not None:
        vocab_size = embedding.shape[0]
    max_positions, rotary_dim = get("context_length", required=True), get("rope.dimension_count", head_dim)
    eos = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return ModelConfig(
        # llama.cpp files Mistral under "llama"; what tells them apart in the computation is the window
        architecture="mistral" if stored_architecture == "llama" and window is not None else stored_architecture,
        hidden_size=hidden_size,
        intermediate_size=get("feed_forward_length", required=True),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=get("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_positions=max_positions,
        rms_norm_eps=get("attention.layer_norm_rms_epsilon", required=True),
        rope_theta=get("rope.freq_base", 10000.0),
        rope_scaling=_rope_scaling(file, stored_architecture, max_positions),
        rotary_dim=rotary_dim,
        sliding_window=window,
        qkv_bias="model.layers.0.self_attn.q_proj.bias" in names,
        o_bias="model.layers.0.self_attn.o_proj.bias" in names,
        mlp_bias="model.layers.0.mlp.gate_proj.bias" in names,
        qk_norm=stored_architecture == "qwen3",
        tie_embeddings="lm_head.weight" not in names,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(token for token in eos if token is not None)),
        hidden_act="silu",
    )


def _rope_scaling(file: GGUFFile, architecture: str, max_positions: Any) -> dict[str, Any] | None:
    """The metadata's rope scaling, or the frequency factors that the converter wrote for Llama 3.1 and later."""
    op, path, metadata = "read_checkpoint", file.path, file.metadata
    prefix = f"{architecture}.rope."
    kind = metadata.get(prefix + "scaling.type")
    factor = metadata.get(prefix + "scaling.factor")
    if kind is None and metadata.get(prefix + "scale_linear") not in (None, 1.0):
        kind, factor = "linear", metadata[prefix + "scale_linear"]
    if kind not in (None, "none", "linear", "yarn"):
        raise value_error(op, f"{prefix}scaling.type of {path}", brief(kind), "none, linear or yarn")
    scaling: dict[str, Any] | None = None
    if kind == "linear" and factor not in (None, 1.0):
        scaling = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        if metadata.get(prefix + "scaling.attn_factor", 1.0) != 1.0:
            raise value_error(
                op, f"{prefix}scaling.attn_factor of {path}", brief(metadata[prefix + "scaling.attn_factor"]), "1"
            )
        original = metadata.get(prefix + "scaling.original_context_length", max_positions)
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        for theirs, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if metadata.get(f"{prefix}scaling.{theirs}") is not None:
                scaling[ours] = metadata[f"{prefix}scaling.{theirs}"]
    if ROPE_FREQS not in file.tensors:
        return scaling
    if scaling is not None:
        raise value_error(op, f"{prefix}scaling.type of {path}", kind, f"none beside {ROPE_FREQS}")
    kind = file.layout(ROPE_FREQS)[0]
    if kind != "F32" or len(file.tensors[ROPE_FREQS].shape) != 1:
        raise value_error(op, f"type of {ROPE_FREQS} in {path}", kind, "an F32 vector")
    factors = tuple(file.read_rows(ROPE_FREQS).view(torch.float32).view(-1).tolist())
    # Frequency i is divided by factor i: longrope's formula, with the same factors at every length and no attention scale.
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": 1.0,
        "short_factor": factors,
        "long_factor": factors,
        "original_max_position_embeddings": max_positions,
    }


def _unpermute(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from (pair, half) order back to (half, pair): whole rows move, so quantised groups stay whole."""
    return rows.view(rows.shape[0] // head_dim, -1, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
