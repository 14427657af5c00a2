"""``fastllm.load``: a checkpoint on disk becomes a model, one tensor at a time."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from os import PathLike
from typing import cast

import torch
from torch import Tensor

from ..errors import dtype_error, value_error
from ..nn.rope import rope_tables
from ..pages import HugePages
from ..quant import LINE_ROWS, QuantizedTensor, cat_rows, pack_parts, quantize
from .llama import Layer, Llama, Weight, Weights
from .loaders import Checkpoint, ModelConfig, TensorMap, read_checkpoint
from .model import LanguageModel

__all__ = ["load"]

NARROWER = ((torch.float32, torch.bfloat16), (torch.float32, torch.float16))  # dtype and a cache of fewer bits
PIECE_WEIGHTS = 1 << 20  # of a matrix that are read and converted at a time
DEFAULT_CONTEXT = 8192  # a larger one costs memory (tables and cache) that most callers do not want


def load(
    path: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    weights: str | None = None,
    head: str | None = None,
    group_size: int = 64,
    symmetric: bool | None = None,
    activations: str = "float",
    cache_dtype: torch.dtype | None = None,
    context: int | None = None,
    tokenizer: bool = True,
    device: torch.device | str = "cpu",
) -> LanguageModel:
    """Load a LLaMA-family checkpoint: Llama 1/2/3, SmolLM2, TinyLlama, Mistral, Qwen2, Qwen3.

    Args:
        path: a GGUF file (F32, F16, BF16, Q4_0, Q4_1, Q8_0; stored integers are used as they are), or a Hugging Face directory
            (config.json, safetensors, tokenizer.json).
        dtype: of activations and float weights: fp32|bf16|fp16; default: fp32 for a GGUF file or quantised weights, else
            the stored dtype.
        weights: None keeps what is stored; "int8" or "int4" quantises the layers' float matrices.
        head: None keeps what is stored; "int8" or "int4" quantises a float head and embedding, which are one matrix in many models.
            It is a large part of what a small model reads for each token.
        group_size: of these quantisations: 32, 64, 128, or -1 for whole rows.
        symmetric: of these quantisations, as ``fastllm.quantize`` has it: without a minimum for each group. Default: for 8 bits.
        activations: "float", or "int8": quantised matrices then see their input rounded to int8, which is faster.
        cache_dtype: of keys and values: default dtype; bf16|fp16 with an fp32 dtype; or int8, with a scale for each token and head.
        context: most tokens in a sequence; default: the model's own, at most 8192.
        tokenizer: False leaves it out, for who gives and takes token ids: a large vocabulary takes time and memory.
        device: "cpu", or a GPU ("cuda", "cuda:1"); tensors go there one by one.

    Raises:
        FileNotFoundError, ValueError: a file that is missing, truncated, corrupt, or does not fit its config.
        NotImplementedError: an architecture or a format that is not served, by name.
    """
    if activations not in ("float", "int8"):
        raise value_error("load", "activations", activations, "'float' or 'int8'")
    if weights not in (None, "int8", "int4"):
        raise value_error("load", "weights", weights, "None, 'int8' or 'int4'")
    if head not in (None, "int8", "int4"):
        raise value_error("load", "head", head, "None, 'int8' or 'int4'")
    if symmetric not in (None, True, False):
        raise value_error("load", "symmetric", symmetric, "None, True or False")
    if tokenizer not in (True, False):
        raise value_error("load", "tokenizer", tokenizer, "True or False")
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise dtype_error("load", "dtype", dtype, "torch.float32, torch.bfloat16 or torch.float16")
    if cache_dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.int8):
        expected = "torch.float32, torch.bfloat16, torch.float16 or torch.int8"
        raise dtype_error("load", "cache_dtype", cache_dtype, expected)
    device = _checked_device(device)
    checkpoint = read_checkpoint(path)
    config = checkpoint.config
    if context is None:
        context = min(config.max_positions, DEFAULT_CONTEXT)
    elif not 1 <= context <= config.max_positions:
        raise value_error("load", "context", context, f"from 1 to {config.max_positions}, the model's own")
    for what in ("o_bias", "mlp_bias"):
        if getattr(config, what):
            raise NotImplementedError(
                f"load: the checkpoint has {what}, expected none (of the biases, only qkv_bias is served)"
            )
    words = _tokenizer(checkpoint) if tokenizer else None
    _give_back_freed_memory()  # what a tokenizer needs for a moment, before the weights come
    bits = {None: None, "int8": 8, "int4": 4}
    builder = _Builder(checkpoint.tensors, config, dtype, bits[weights], bits[head], group_size, symmetric, device)
    model_weights = builder.weights()
    tables = rope_tables(
        head_dim=config.head_dim,
        rope_theta=config.rope_theta,
        rotary_dim=config.rotary_dim,
        rope_scaling=config.rope_scaling,
        max_positions=context,
        device=device,
    )
    if cache_dtype not in (None, builder.dtype, torch.int8) and (builder.dtype, cache_dtype) not in NARROWER:
        raise dtype_error("load", "cache_dtype", cache_dtype, f"{builder.dtype} or torch.int8", "to match dtype")
    llama = Llama(config, model_weights, tables, dtype=builder.dtype, cache_dtype=cache_dtype, activations=activations)
    del checkpoint, builder  # the file's metadata, a vocabulary among it
    _give_back_freed_memory()
    return LanguageModel(llama, words, context)


def _checked_device(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise value_error("load", "device", device, "'cpu' or a GPU: 'cuda', 'cuda:1'") from None
    if found.type not in ("cpu", "cuda"):
        raise value_error("load", "device", device, "'cpu' or a GPU: 'cuda', 'cuda:1'")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise value_error("load", "device", device, "'cpu', because torch.cuda.is_available() is False here")
    return found


def _give_back_freed_memory() -> None:
    """glibc keeps what is freed between blocks that live on: some 8 MiB for a 135M model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _tokenizer(checkpoint: Checkpoint):  # type: ignore[no-untyped-def]
    try:
        return checkpoint.tokenizer()
    except FileNotFoundError:  # ids in, ids out; text is refused when it is asked for
        return None


class _Builder:
    """Joins, converts and packs a checkpoint's tensors."""

    def __init__(
        self,
        tensors: TensorMap,
        config: ModelConfig,
        dtype: torch.dtype | None,
        bits: int | None,
        head_bits: int | None,
        group_size: int,
        symmetric: bool | None,
        device: torch.device,
    ) -> None:
        self.tensors, self.config, self.device = tensors, config, device
        self.group_size, self.symmetric = group_size, symmetric
        self.bits, self.head_bits = bits, head_bits
        self.memory = HugePages()  # of all packed matrices
        if dtype is None:
            stored = tensors.rows("model.layers.0.self_attn.o_proj.weight", 0, 1)
            quantised = isinstance(stored, QuantizedTensor) or bits is not None
            dtype = torch.float32 if quantised or isinstance(stored, QuantizedTensor) else stored.dtype
        self.dtype = dtype

    def weights(self) -> Weights:
        embedding = self.matrix("model.embed_tokens", bits=self.head_bits)
        return Weights(
            embedding=embedding,
            layers=[self.layer(f"model.layers.{i}.") for i in range(self.config.num_layers)],
            norm=self.vector("model.norm.weight"),
            head=embedding if self.config.tie_embeddings else self.matrix("lm_head", bits=self.head_bits),
        )

    def layer(self, at: str) -> Layer:
        qkv = [f"{at}self_attn.{name}_proj" for name in "qkv"]
        return Layer(
            attention_norm=self.vector(at + "input_layernorm.weight"),
            qkv=self.matrix(*qkv, bits=self.bits),
            qkv_bias=torch.cat([self.vector(n + ".bias") for n in qkv]) if self.config.qkv_bias else None,
            q_norm=self.vector(at + "self_attn.q_norm.weight") if self.config.qk_norm else None,
            k_norm=self.vector(at + "self_attn.k_norm.weight") if self.config.qk_norm else None,
            o=self.matrix(at + "self_attn.o_proj", bits=self.bits),
            mlp_norm=self.vector(at + "post_attention_layernorm.weight"),
            gate_up=self.matrix(at + "mlp.gate_proj", at + "mlp.up_proj", bits=self.bits),
            down=self.matrix(at + "mlp.down_proj", bits=self.bits),
        )

    def vector(self, name: str) -> Tensor:
        value = self.tensors[name]
        if isinstance(value, QuantizedTensor):
            raise ValueError(f"load: {name} is quantised, expected a float vector")
        return value.to(self.device, self.dtype)

    def matrix(self, *names: str, bits: int | None) -> Weight:
        """The matrices' rows one below the other, packed if quantised, as float ones are where ``bits`` are given. They are read and
        converted piece by piece."""
        names = tuple(f"{name}.weight" for name in names)
        rows = [self.tensors.shapes[name][0] for name in names]
        pieces = (self.rows(name, *at, bits) for name, n in zip(names, rows) for at in self.ranges(name, n))
        first_rows = [self.rows(name, 0, 1, bits) for name in names]
        quantised = [row for row in first_rows if isinstance(row, QuantizedTensor)]
        if len(quantised) == len(names):
            if all(row.alike(quantised[0]) for row in quantised) and not any(n % LINE_ROWS for n in rows[:-1]):
                return pack_parts(cast(Iterator[QuantizedTensor], pieces), sum(rows), self.memory).to(self.device)
            whole = [self.rows(name, 0, n, bits) for name, n in zip(names, rows)]
            return cat_rows(cast(list[QuantizedTensor], whole)).pack(self.memory).to(self.device)
        out = torch.empty((sum(rows), self.tensors.shapes[names[0]][1]), dtype=self.dtype, device=self.device)
        done = 0
        for piece in pieces:
            end = done + piece.shape[0]
            out[done:end] = piece.dequantize(self.dtype) if isinstance(piece, QuantizedTensor) else piece
            done = end
        return out

    def rows(self, name: str, start: int, stop: int, bits: int | None) -> Tensor | QuantizedTensor:
        """As they are stored; quantised, where ``bits`` are given."""
        part = self.tensors.rows(name, start, stop)
        if bits is None or isinstance(part, QuantizedTensor):
            return part
        return quantize(part, bits, self.group_size, symmetric=self.symmetric)

    def ranges(self, name: str, rows: int) -> Iterator[tuple[int, int]]:
        """Whole blocks of 16 rows, of about a million weights together: what is held beside the result stays in the cache."""
        step = max(1, PIECE_WEIGHTS // self.tensors.shapes[name][1] // LINE_ROWS) * LINE_ROWS
        return ((start, min(start + step, rows)) for start in range(0, rows, step))
