"""The same made-up model in every form that the rivals read: seeded random weights in a real model's shapes.

    python -m benchmarks.rivals.make_models 1b hf q4_0 q8_0

Weights are drawn tensor by tensor, so memory holds one tensor, and each goes to all the files asked for: hf is a Hugging Face
directory in bf16, q4_0 and q8_0 are GGUF files of those very bf16 values, rounded by ggml's own rule.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .common import HOME, SHAPES, Shape

FORMS = ("hf", "q4_0", "q8_0")
LAYER_NAMES = {  # Hugging Face -> GGUF
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
UNKNOWN, BOS, EOS = 0, 1, 2


def path(shape: str, form: str) -> Path:
    return HOME / "models" / shape / (form if form == "hf" else f"{form}.gguf")


def make(name: str, forms: list[str]) -> None:
    """Write what is not there yet; a file appears under its name when it is complete."""
    forms = [form for form in forms if not path(name, form).exists()]
    if not forms:
        return
    shape, beside = SHAPES[name], {form: path(name, form).with_name(f"{form}.part") for form in forms}
    (HOME / "models" / name).mkdir(parents=True, exist_ok=True)
    writers: list[Any] = [
        HuggingFaceWriter(beside[form], shape) if form == "hf" else GGUFWriter(beside[form], shape, form) for form in forms
    ]
    for index, (tensor, dims) in enumerate(tensors(shape)):
        bits = draw(index, tensor, dims)
        for writer in writers:
            writer.add(tensor, bits)
    for form, writer in zip(forms, writers):
        writer.close()
        os.replace(beside[form], path(name, form))


# ---------------------------------------------------------------- the weights


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Hugging Face names and shapes, in the order in which they are drawn and stored."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    q, kv = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab_size, hidden)
    for i in range(shape.num_hidden_layers):
        at = f"model.layers.{i}."
        yield at + "input_layernorm.weight", (hidden,)
        yield at + "self_attn.q_proj.weight", (q, hidden)
        yield at + "self_attn.k_proj.weight", (kv, hidden)
        yield at + "self_attn.v_proj.weight", (kv, hidden)
        yield at + "self_attn.o_proj.weight", (hidden, q)
        yield at + "post_attention_layernorm.weight", (hidden,)
        yield at + "mlp.gate_proj.weight", (inner, hidden)
        yield at + "mlp.up_proj.weight", (inner, hidden)
        yield at + "mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not shape.tie_word_embeddings:
        yield "lm_head.weight", (shape.vocab_size, hidden)


def draw(index: int, name: str, dims: tuple[int, ...]) -> np.ndarray:
    """The bf16 values as uint16. Matrices have LLaMA's initial deviation, 0.02, which keeps activations near 1."""
    values = np.random.default_rng([0, index]).standard_normal(dims, np.float32)
    values *= 0.1 if len(dims) == 1 else 0.02
    if len(dims) == 1:
        values += 1.0
    bits = values.view(np.uint32)
    bits += 0x7FFF + (bits >> 16 & 1)  # round to nearest, ties to even
    return (bits >> 16).astype(np.uint16)


def floats(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


# ---------------------------------------------------------------- the files


def vocabulary(size: int) -> list[str]:
    """Control tokens, bytes, then made-up words: no engine is given text, but all want a vocabulary."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return special + [f"\u2581t{i}" for i in range(len(special), size)]


class HuggingFaceWriter:
    """config.json, model.safetensors, tokenizer.json: a header whose offsets are known beforehand, then the data."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        sizes = {key: value for key, value in asdict(shape).items() if key not in ("title", "rope_theta")}
        rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes, "hidden_act": "silu", "dtype": "bfloat16",
            "rope_parameters": rope, "rope_theta": shape.rope_theta, "bos_token_id": BOS, "eos_token_id": EOS,
        }  # fmt: skip
        _write(folder / "config.json", config)
        words = {word: i for i, word in enumerate(vocabulary(shape.vocab_size))}
        tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>", byte_fallback=True))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
        tokenizer.save(str(folder / "tokenizer.json"))
        specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        _write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **specials})

        header, end = {}, 0
        for name, dims in tensors(shape):
            start, end = end, end + 2 * int(np.prod(dims))
            header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": (start, end)}
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        text += b" " * (-len(text) % 8)
        self.file = (folder / "model.safetensors").open("wb")
        self.file.write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, bits: np.ndarray) -> None:
        self.file.write(bits.data)

    def close(self) -> None:
        self.file.close()


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


class GGUFWriter:
    """llama.cpp's file. A tied embedding is quantised like all matrices, since it is the output matrix too."""

    def __init__(self, file: Path, shape: Shape, form: str) -> None:
        import gguf

        self.quantize, self.shape = gguf.quants.quantize, shape
        self.type = {"q4_0": gguf.GGMLQuantizationType.Q4_0, "q8_0": gguf.GGMLQuantizationType.Q8_0}[form]
        w = self.writer = gguf.GGUFWriter(file, "llama")
        w.add_context_length(shape.max_position_embeddings)
        w.add_embedding_length(shape.hidden_size)
        w.add_block_count(shape.num_hidden_layers)
        w.add_feed_forward_length(shape.intermediate_size)
        w.add_head_count(shape.num_attention_heads)
        w.add_head_count_kv(shape.num_key_value_heads)
        w.add_key_length(shape.head_dim)
        w.add_value_length(shape.head_dim)
        w.add_layer_norm_rms_eps(shape.rms_norm_eps)
        w.add_rope_freq_base(shape.rope_theta)
        w.add_rope_dimension_count(shape.head_dim)
        w.add_vocab_size(shape.vocab_size)
        w.add_file_type({"q4_0": gguf.LlamaFileType.MOSTLY_Q4_0, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}[form])
        w.add_tokenizer_model("llama")
        w.add_token_list(vocabulary(shape.vocab_size))
        w.add_token_scores([0.0] * shape.vocab_size)
        kind = gguf.TokenType
        kinds = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, *[kind.BYTE] * 256]
        w.add_token_types(kinds + [kind.NORMAL] * (shape.vocab_size - len(kinds)))
        w.add_bos_token_id(BOS)
        w.add_eos_token_id(EOS)
        w.add_unk_token_id(UNKNOWN)
        for name, dims in tensors(shape):
            if len(dims) == 1:
                w.add_tensor_info(self.name(name), dims, np.dtype(np.float32), 4 * dims[0])
            else:
                stored = gguf.quants.quant_shape_to_byte_shape(dims, self.type)
                w.add_tensor_info(self.name(name), stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=self.type)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_ti_data_to_file()

    @staticmethod
    def name(name: str) -> str:
        top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        stem = name.removesuffix(".weight")
        if stem in top:
            return top[stem] + ".weight"
        layer, leaf = stem.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{LAYER_NAMES[leaf]}.weight"

    def add(self, name: str, bits: np.ndarray) -> None:
        values = floats(bits)
        heads = {"q_proj": self.shape.num_attention_heads, "k_proj": self.shape.num_key_value_heads}
        for projection, count in heads.items():
            if projection in name:  # llama.cpp's rotary wants the two halves of a head in turns
                values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        self.writer.write_tensor_data(values if values.ndim == 1 else self.quantize(values, self.type))

    def close(self) -> None:
        self.writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("forms", nargs="+", choices=FORMS)
    arguments = parser.parse_args()
    make(arguments.shape, arguments.forms)


if __name__ == "__main__":
    main()
