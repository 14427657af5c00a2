"""Tables of cos and sin for rotary position embedding, for every scaling that transformers' model configs name.

inv_freq, and the angle position * inv_freq, are computed in fp32 by the very expressions of transformers' rope functions,
so that tables equal the reference model's bit for bit. Float64 would be nearer to the formula (at position 100000 an fp32
angle is off by up to 0.004 rad), but further from the model as it was trained and is served: equality wins.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import dtype_error, type_error, value_error

__all__ = ["RopeTables", "rope_tables"]

_OP = "rope_tables"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class RopeTables:
    """cos and sin (max_positions, rotary_dim), row p for position p, with ``attention_scaling`` already multiplied in.

    ``inv_freq`` (rotary_dim / 2,) fp32 holds each pair's radians per token.
    """

    cos: Tensor
    sin: Tensor
    inv_freq: Tensor
    attention_scaling: float


# ---------------------------------------------------------------- reading the configuration


@dataclass(frozen=True)
class _Config:
    """What a scaling's function may ask for."""

    scaling: Mapping[str, Any]
    base: float
    head_dim: int
    dim: int  # rotary_dim
    partial: float  # partial_rotary_factor
    seq_len: int
    max_position_embeddings: int | None
    original: int | None  # original_max_position_embeddings

    def number(self, key: str, default: float | None = None) -> float:
        value = self.scaling.get(key)
        if value is None:
            if default is None:
                kind = self.scaling.get("rope_type", self.scaling.get("type"))
                raise value_error(_OP, f"rope_scaling[{key!r}]", value, "a positive number", f"because rope_type is {kind!r}")
            return default
        return _positive(f"rope_scaling[{key!r}]", value)

    def original_length(self) -> float:
        if self.original is not None:
            return self.original
        return self.number("original_max_position_embeddings", self.max_position_embeddings)

    def pretrained_length(self, why: str) -> int:
        if self.max_position_embeddings is None:
            raise value_error(_OP, "max_position_embeddings", None, "a positive integer", why)
        return self.max_position_embeddings

    def factors(self, key: str) -> Tensor:
        value = self.scaling.get(key)
        name = f"rope_scaling[{key!r}]"
        if isinstance(value, Tensor):
            value = value.tolist()
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise type_error(_OP, name, value, f"a list of {self.dim // 2} positive numbers")
        if len(value) != self.dim // 2:
            raise value_error(_OP, f"the length of {name}", len(value), str(self.dim // 2), "a factor for each pair of lanes")
        return torch.tensor([_positive(f"{name}[{i}]", v) for i, v in enumerate(value)], dtype=torch.float32)

    def powers(self) -> Tensor:
        """base^(2 i / dim), in fp32."""
        return self.base ** (torch.arange(0, self.dim, 2, dtype=torch.int64).float() / self.dim)


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise type_error(_OP, name, value, "a positive number")
    if not (float(value) > 0 and math.isfinite(value)):
        raise value_error(_OP, name, value, "a positive number")
    return value  # type: ignore[return-value]  # ints stay ints: transformers' arithmetic on them is exact


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise type_error(_OP, name, value, "a positive integer")
    if value < 1:
        raise value_error(_OP, name, value, "a positive integer")
    return int(value)


# ---------------------------------------------------------------- the scalings: (inv_freq, attention_scaling)


def _default(c: _Config) -> tuple[Tensor, float]:
    return 1.0 / c.powers(), 1.0


def _linear(c: _Config) -> tuple[Tensor, float]:
    """Positions are interpolated: divided by factor."""
    return 1.0 / c.powers() / c.number("factor"), 1.0


def _dynamic(c: _Config) -> tuple[Tensor, float]:
    """The base grows with the sequence (NTK-aware), beyond max_position_embeddings."""
    factor, length = c.number("factor"), c.pretrained_length("because dynamic scaling starts beyond it")
    if c.dim == 2:
        raise value_error(_OP, "rotary_dim", c.dim, "at least 4", "because dynamic scaling divides by rotary_dim - 2")
    grown = (factor * max(c.seq_len, length) / length) - (factor - 1)
    base = c.base * grown ** (c.dim / (c.dim - 2))
    return 1.0 / (base ** (torch.arange(0, c.dim, 2, dtype=torch.int64).float() / c.dim)), 1.0


def _llama3(c: _Config) -> tuple[Tensor, float]:
    """Long wavelengths are interpolated, short ones kept, those between blended."""
    factor, low, high = c.number("factor"), c.number("low_freq_factor"), c.number("high_freq_factor")
    if low >= high:
        because = f"to be below high_freq_factor {high}"
        raise value_error(_OP, "rope_scaling['low_freq_factor']", low, "a smaller number", because)
    length = c.original_length()
    inv_freq = 1.0 / c.powers()
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > length / low, inv_freq / factor, inv_freq)
    smooth = (length / wavelength - low) / (high - low)
    blended = (1 - smooth) * scaled / factor + smooth * scaled
    between = ~(wavelength < length / high) * ~(wavelength > length / low)
    return torch.where(between, blended, scaled), 1.0


def _yarn(c: _Config) -> tuple[Tensor, float]:
    """Pairs that turn less than beta_slow times in the original context are interpolated, more than beta_fast kept."""
    length = c.original_length()
    factor = c.scaling.get("factor")
    if factor is None:  # DeepSeek-V3
        factor = c.pretrained_length("because rope_scaling gives no factor") / length
    factor = _positive("rope_scaling['factor']", factor)
    fast, slow = c.number("beta_fast", 32), c.number("beta_slow", 1)
    if fast < slow:
        raise value_error(_OP, "rope_scaling['beta_fast']", fast, f"at least beta_slow {slow}")

    def magnitude(scale: float, mscale: float = 1) -> float:
        return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0

    if c.scaling.get("attention_factor") is not None:
        attention = float(c.number("attention_factor"))
    elif c.scaling.get("mscale") and c.scaling.get("mscale_all_dim"):
        attention = float(magnitude(factor, c.number("mscale")) / magnitude(factor, c.number("mscale_all_dim")))
    else:
        attention = magnitude(factor)

    def pair_that_turns(times: float) -> float:
        return (c.dim * math.log(length / (times * 2 * math.pi))) / (2 * math.log(c.base))

    first, last = pair_that_turns(fast), pair_that_turns(slow)
    if c.scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, c.dim - 1)
    if first == last:
        last += 0.001
    ramp = torch.clamp((torch.arange(c.dim // 2, dtype=torch.float32) - first) / (last - first), 0, 1)
    powers = c.powers()
    keep = 1 - ramp
    return 1.0 / (factor * powers) * (1 - keep) + 1.0 / powers * keep, attention


def _longrope(c: _Config) -> tuple[Tensor, float]:
    """A divisor for each pair, from one list up to the original context and from another beyond."""
    length = c.original_length()
    long, short = c.factors("long_factor"), c.factors("short_factor")
    if c.scaling.get("attention_factor") is not None:
        attention = float(c.number("attention_factor"))
    else:
        factor = c.scaling.get("factor")
        if factor is None:  # Phi-3
            factor = c.pretrained_length("because rope_scaling gives neither factor nor attention_factor") / length
        factor = _positive("rope_scaling['factor']", factor)
        attention = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(length))
    return 1.0 / ((long if c.seq_len > length else short) * c.powers()), attention


def _proportional(c: _Config) -> tuple[Tensor, float]:
    """Gemma 4: frequencies of the whole head; those beyond partial_rotary_factor stand still."""
    turning = int(c.partial * c.head_dim // 2)
    powers = c.base ** (torch.arange(0, 2 * turning, 2, dtype=torch.int64).float() / c.head_dim)
    inv_freq = torch.cat((1.0 / powers, torch.zeros(c.head_dim // 2 - turning)))
    return inv_freq / c.number("factor", 1.0), 1.0


def _factors(c: _Config) -> tuple[Tensor, float]:
    """GGUF files store the divisors themselves (rope_freqs.weight)."""
    return 1.0 / c.powers() / c.factors("factors"), 1.0


_SCALINGS: dict[str, Callable[[_Config], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,  # Phi-3's first name for it
    "proportional": _proportional,
    "factors": _factors,
}


def rope_tables(
    max_positions: int,
    head_dim: int,
    *,
    rope_theta: float = 10000.0,
    rotary_dim: int | None = None,
    partial_rotary_factor: float | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
    max_position_embeddings: int | None = None,
    original_max_position_embeddings: int | None = None,
    seq_len: int | None = None,
    interleaved: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> RopeTables:
    """cos and sin of every position's angles, as a model's config asks for them.

    angle[p, i] = p * inv_freq[i];  inv_freq[i] = rope_theta^(-2 i / rotary_dim), then scaled

    Args:
        max_positions: rows, in tokens; at most 2^24, where fp32 stops to count.
        head_dim: lanes of a head.
        rope_theta: the base; ``rope_scaling["rope_theta"]`` wins, as in transformers.
        rotary_dim: how many lanes turn; default head_dim * partial_rotary_factor.
        partial_rotary_factor: default 1; ``rope_scaling["partial_rotary_factor"]`` wins.
        rope_scaling: transformers' dict (``rope_scaling``, or 5.x's ``rope_parameters``) with ``rope_type`` (or ``type``) of
            default, linear, dynamic, llama3, yarn, longrope or proportional and that type's parameters; keys that the type
            does not know are ignored. Also ``{"rope_type": "factors", "factors": [...]}``: a divisor for each pair.
        max_position_embeddings: the config's, for types that need it: dynamic, and where others leave a length out.
        original_max_position_embeddings: the config's, if it has one outside of rope_scaling (Phi-3); it wins.
        seq_len: tokens in the sequence, for dynamic and longrope, whose frequencies depend on it; default max_positions.
        interleaved: repeat each angle for lanes (2i, 2i + 1), as apply_rotary(interleaved=True) reads them, instead of for
            lanes (i, i + rotary_dim / 2).
        dtype: of cos and sin, rounded from fp32.

    Returns:
        RopeTables; its cos and sin go to apply_rotary_cache as they are, or, indexed by position, to apply_rotary.

    Raises:
        TypeError: a parameter's type. ValueError: an unknown rope_type, by name, or a parameter missing or out of range.

    Numerics: fp32, the same operations in the same order as transformers 5.x, so the same bits.
    Source: arXiv:2104.09864 (RoPE), 2306.15595 (linear), 2309.00071 (yarn, dynamic), 2402.13753 (longrope), 2407.21783 (llama3).
    """
    max_positions, head_dim = _count("max_positions", max_positions), _count("head_dim", head_dim)
    if max_positions > 1 << 24:
        raise value_error(_OP, "max_positions", max_positions, f"at most {1 << 24}", "because fp32 counts no further")
    if dtype not in _DTYPES:
        raise dtype_error(_OP, "dtype", dtype, ", ".join(map(str, _DTYPES)))
    if rope_scaling is not None and not isinstance(rope_scaling, Mapping):
        raise type_error(_OP, "rope_scaling", rope_scaling, "a dict or None")
    scaling = dict(rope_scaling or {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise value_error(_OP, "rope_scaling['rope_type']", kind, "one of " + ", ".join(_SCALINGS))
    base = _positive("rope_theta", rope_theta if scaling.get("rope_theta") is None else scaling["rope_theta"])
    if base == 1.0:
        raise value_error(_OP, "rope_theta", base, "a number other than 1", "because every pair would turn alike")
    partial = scaling.get("partial_rotary_factor", partial_rotary_factor)
    partial = _positive("partial_rotary_factor", 1.0 if partial is None else partial)
    if rotary_dim is None:
        rotary_dim = head_dim if kind == "proportional" else int(head_dim * partial)
    if not 2 <= _count("rotary_dim", rotary_dim) <= head_dim or rotary_dim % 2:
        raise value_error(_OP, "rotary_dim", rotary_dim, f"an even number from 2 to head_dim {head_dim}")
    for name, value in (
        ("seq_len", seq_len),
        ("max_position_embeddings", max_position_embeddings),
        ("original_max_position_embeddings", original_max_position_embeddings),
    ):
        if value is not None:
            _count(name, value)
    config = _Config(
        scaling=scaling,
        base=base,
        head_dim=head_dim,
        dim=rotary_dim,
        partial=partial,
        seq_len=seq_len or max_positions,
        max_position_embeddings=max_position_embeddings,
        original=original_max_position_embeddings,
    )
    inv_freq, attention_scaling = _SCALINGS[kind](config)
    angles = torch.arange(max_positions, dtype=torch.int64)[:, None].float() * inv_freq
    cos, sin = (  # widened last: a long context's tables are megabytes
        half.repeat_interleave(2, -1) if interleaved else torch.cat((half, half), -1)
        for half in ((f(angles) * attention_scaling).to(device=device, dtype=dtype) for f in (torch.cos, torch.sin))
    )
    return RopeTables(cos, sin, inv_freq.to(device), float(attention_scaling))
