"""What the model is: its sizes and switches, from any kind of checkpoint, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fastllm.errors import type_error, value_error

__all__ = ["ARCHITECTURES", "HIDDEN_ACTS", "ModelConfig", "brief", "config_from_hf", "unknown_architecture"]

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
HIDDEN_ACTS = ("silu", "gelu", "gelu_pytorch_tanh")
ROPE_TYPES = ("linear", "dynamic", "llama3", "yarn", "longrope")

# Far above every published model, low enough that no product of two sizes overflows 64 bits.
MAX_SIZE = 1 << 24
MAX_LAYERS = 4096
MAX_POSITIONS = 1 << 30

# What transformers assumes where config.json is silent.
HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}
HF_CLASSES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
HF_ACTS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_pytorch_tanh"}


@dataclass(frozen=True)
class ModelConfig:
    """A LLaMA-family decoder.

    Args:
        architecture: "llama", "mistral", "qwen2" or "qwen3".
        max_positions: tokens of context that the model was made for.
        rms_norm_eps: added to the mean square.
        rope_theta: base of the rotary frequencies.
        rope_scaling: None for plain rotary, else transformers' vocabulary: "rope_type" linear, dynamic, llama3, yarn or
            longrope and that type's parameters. Frequency factors out of a GGUF file are a longrope whose short and long
            factors are equal and whose attention_factor is 1, which is the same formula.
        rotary_dim: leading features of each head that rotate; head_dim unless the model says less.
        sliding_window: how many of the last tokens a query sees, itself included; None for all.
        qkv_bias, o_bias, mlp_bias: which projections have a bias.
        qk_norm: RMSNorm over head_dim on q and k before the rotary embedding (Qwen3).
        tie_embeddings: the output projection is the embedding matrix; there is no ``lm_head.weight``.
        eos_token_ids: any of them ends generation.

    Raises: TypeError for a value of the wrong type, ValueError for one out of range or at odds with another.
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    rotary_dim: int
    sliding_window: int | None
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    hidden_act: str

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise unknown_architecture("ModelConfig", "architecture", self.architecture)
        for name in ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size"):
            _check_int(name, getattr(self, name), 1, MAX_SIZE)
        _check_int("num_layers", self.num_layers, 1, MAX_LAYERS)
        _check_int("max_positions", self.max_positions, 1, MAX_POSITIONS)
        _check_int("num_heads * head_dim", self.num_heads * self.head_dim, 1, MAX_SIZE)
        if self.num_heads % self.num_kv_heads:
            raise value_error("ModelConfig", "num_kv_heads", self.num_kv_heads, f"a divisor of num_heads = {self.num_heads}")
        _check_int("rotary_dim", self.rotary_dim, 2, self.head_dim)
        if self.rotary_dim % 2:
            raise value_error("ModelConfig", "rotary_dim", self.rotary_dim, "an even number", "features rotate in pairs")
        _check_number("rms_norm_eps", self.rms_norm_eps, 0.0, 1.0)
        _check_number("rope_theta", self.rope_theta, 1.0, 1e15)
        if self.sliding_window is not None:
            _check_int("sliding_window", self.sliding_window, 1, MAX_POSITIONS)
        for name in ("qkv_bias", "o_bias", "mlp_bias", "qk_norm", "tie_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise type_error("ModelConfig", name, getattr(self, name), "a bool")
        if self.bos_token_id is not None:
            _check_int("bos_token_id", self.bos_token_id, 0, self.vocab_size - 1)
        for token in self.eos_token_ids:
            _check_int("eos_token_ids", token, 0, self.vocab_size - 1)
        if self.hidden_act not in HIDDEN_ACTS:
            raise value_error("ModelConfig", "hidden_act", brief(self.hidden_act), " or ".join(HIDDEN_ACTS))
        if self.rope_scaling is not None:
            _check_rope_scaling(self.rope_scaling, self.rotary_dim)


def brief(value: Any) -> Any:
    """A value as an error text may show it: a hostile file must not fill the terminal."""
    if isinstance(value, str):
        return value if len(value) <= 80 else value[:77] + "..."
    if isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= 128):
        return value
    return brief(repr(value))


def unknown_architecture(op: str, arg: str, got: Any) -> ValueError:
    """The one text for a model that is none of ours."""
    return value_error(op, arg, brief(got), ", ".join(ARCHITECTURES[:-1]) + f" or {ARCHITECTURES[-1]}")


def config_from_hf(values: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    """config.json as transformers writes it, and generation_config.json for the end-of-text tokens."""
    op = "read_checkpoint"
    model_type = values.get("model_type")
    if model_type is None:
        classes = values.get("architectures")
        first = classes[0] if isinstance(classes, list) and classes else None
        model_type = HF_CLASSES.get(first) if isinstance(first, str) else None
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise unknown_architecture(op, "model_type in config.json", model_type)
    if values.get("quantization_config") is not None:
        raise value_error(
            op, "quantization_config in config.json", brief(values["quantization_config"]), "none", "quantised weights of "
            "Hugging Face directories are not read; convert with fastllm.quant.from_gptq, from_awq or from_hqq"
        )  # fmt: skip
    values = {**HF_DEFAULTS[model_type], **values}
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if name not in values:
            raise value_error(op, f"{name} in config.json", None, "an integer")
    hidden_size, num_heads = (_file_int(values, name) for name in ("hidden_size", "num_attention_heads"))
    head_dim = values.get("head_dim")
    if head_dim is None:
        if hidden_size % num_heads:
            raise value_error(
                op, "hidden_size in config.json", hidden_size, f"a multiple of num_attention_heads = {num_heads}",
                "there is no head_dim",
            )  # fmt: skip
        head_dim = hidden_size // num_heads
    _check_int("head_dim", head_dim, 1, MAX_SIZE)
    num_kv_heads = values.get("num_key_value_heads")
    max_positions = _file_int(values, "max_position_embeddings")
    theta, scaling, rotary_factor = _hf_rope(values, max_positions)
    _check_number("partial_rotary_factor", rotary_factor, 0.0, 1.0)
    attention_bias = values.get("attention_bias")
    attention_bias = False if attention_bias is None else attention_bias
    mlp_bias = values.get("mlp_bias")
    hidden_act = values.get("hidden_act", "silu")
    eos = values.get("eos_token_id")
    if generation is not None and generation.get("eos_token_id") is not None:
        eos = generation["eos_token_id"]
    return ModelConfig(
        architecture=model_type,
        hidden_size=hidden_size,
        intermediate_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
        head_dim=head_dim,
        vocab_size=values["vocab_size"],
        max_positions=max_positions,
        rms_norm_eps=values.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        rotary_dim=int(head_dim * rotary_factor),
        sliding_window=_hf_sliding_window(model_type, values),
        qkv_bias=True if model_type == "qwen2" else attention_bias and model_type != "mistral",
        o_bias=attention_bias if model_type in ("llama", "qwen3") else False,
        mlp_bias=mlp_bias if model_type == "llama" and mlp_bias is not None else False,
        qk_norm=model_type == "qwen3",
        tie_embeddings=values.get("tie_word_embeddings", False),
        bos_token_id=values.get("bos_token_id"),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        hidden_act=HF_ACTS.get(hidden_act, hidden_act) if isinstance(hidden_act, str) else hidden_act,
    )


def _hf_rope(values: dict[str, Any], max_positions: int) -> tuple[float, dict[str, Any] | None, float]:
    """rope_theta, rope_scaling and partial_rotary_factor, from ``rope_parameters`` (new) or ``rope_scaling`` (old)."""
    op = "read_checkpoint"
    found: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        part = values.get(name)
        if part is None:
            continue
        if not isinstance(part, dict):
            raise type_error(op, f"{name} in config.json", part, "an object or null")
        if any(isinstance(value, dict) for value in part.values()):
            raise value_error(op, f"{name} in config.json", brief(part), "one flat object", "the same for all layers")
        found.update(part)
    theta = found.pop("rope_theta", None)
    if theta is None:
        theta = values.get("rope_theta")
    rotary_factor = found.pop("partial_rotary_factor", None)
    if rotary_factor is None:
        rotary_factor = values.get("partial_rotary_factor")
    old_name = found.pop("type", None)
    kind = found.pop("rope_type", old_name)
    scaling: dict[str, Any] | None = None
    if kind not in (None, "default"):
        scaling = {"rope_type": kind, **{key: value for key, value in found.items() if value is not None}}
        original = values.get("original_max_position_embeddings")
        if kind in ("yarn", "longrope", "llama3"):
            scaling.setdefault("original_max_position_embeddings", max_positions if original is None else original)
    return 10000.0 if theta is None else theta, scaling, 1.0 if rotary_factor is None else rotary_factor


def _hf_sliding_window(model_type: str, values: dict[str, Any]) -> int | None:
    """One window for all layers or none; a mixture is refused."""
    window = values.get("sliding_window")
    layers = _file_int(values, "num_hidden_layers")
    if model_type == "llama" or window is None:
        return None
    if model_type in ("qwen2", "qwen3") and not values.get("use_sliding_window", False):
        return None
    kinds = values.get("layer_types")
    if kinds is None and model_type != "mistral":
        first = values.get("max_window_layers", 28)
        _check_int("max_window_layers", first, 0, MAX_SIZE)
        kinds = ["full_attention"] * min(first, layers) + ["sliding_attention"] * max(layers - first, 0)
    if kinds is None or (isinstance(kinds, list) and all(kind == "sliding_attention" for kind in kinds)):
        return window
    if isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds):
        return None
    raise value_error(
        "read_checkpoint", "layer_types in config.json", brief(kinds), "one kind for all layers",
        "a mixture of full and sliding attention is not supported",
    )  # fmt: skip


def _file_int(values: dict[str, Any], name: str) -> int:
    value = values[name]
    _check_int(name, value, 1, MAX_POSITIONS)
    return int(value)


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise type_error("ModelConfig", name, value, "an integer")
    if not low <= value <= high:
        raise value_error("ModelConfig", name, brief(value), f"an integer from {low} to {high}")


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise type_error("ModelConfig", name, value, "a number")
    if not low <= value <= high:  # false for nan too
        raise value_error("ModelConfig", name, brief(value), f"a number from {low:g} to {high:g}")


def _check_rope_scaling(scaling: Any, rotary_dim: int) -> None:
    """Types, ranges and presence of the parameters that each rope_type reads."""
    if not isinstance(scaling, dict):
        raise type_error("ModelConfig", "rope_scaling", scaling, "a dict or None")
    kind = scaling.get("rope_type")
    if kind not in ROPE_TYPES:
        raise value_error("ModelConfig", "rope_type", brief(kind), "default, " + ", ".join(ROPE_TYPES))
    required = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "yarn": ("factor", "original_max_position_embeddings"),
        "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    }
    for name in required[kind]:
        if name not in scaling:
            raise value_error("ModelConfig", f"{name} of rope_scaling", None, "a value", f"rope_type {kind} reads it")
    for name in ("factor", "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow"):
        if name in scaling:
            _check_number(f"{name} of rope_scaling", scaling[name], 1e-6, 1e6)
    for name in ("mscale", "mscale_all_dim"):
        if name in scaling:
            _check_number(f"{name} of rope_scaling", scaling[name], 0.0, 1e6)
    if "original_max_position_embeddings" in scaling:
        original = scaling["original_max_position_embeddings"]
        _check_int("original_max_position_embeddings", original, 1, MAX_POSITIONS)
    if "truncate" in scaling and not isinstance(scaling["truncate"], bool):
        raise type_error("ModelConfig", "truncate of rope_scaling", scaling["truncate"], "a bool")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise value_error(
            "ModelConfig", "high_freq_factor of rope_scaling", scaling["high_freq_factor"],
            f"more than low_freq_factor = {scaling['low_freq_factor']}",
        )  # fmt: skip
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            factors = scaling[name]
            if not isinstance(factors, (list, tuple)) or len(factors) != rotary_dim // 2:
                raise value_error(
                    "ModelConfig", f"{name} of rope_scaling", brief(factors), f"{rotary_dim // 2} numbers",
                    "one for each pair of rotary features",
                )  # fmt: skip
            for factor in factors:
                _check_number(f"{name} of rope_scaling", factor, 1e-6, 1e6)
                if not math.isfinite(1.0 / factor):
                    raise value_error("ModelConfig", f"{name} of rope_scaling", factor, "a number with an inverse")
