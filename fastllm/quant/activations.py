"""Activations rounded to int8: what quant_matmul multiplies with ``activations="int8"``, and what norms and gates can write.

A scale for each token and group of columns: the idea is LLM.int8()'s (Dettmers et al., 2022, https://arxiv.org/abs/2208.07339),
the groups are llama.cpp's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .rounding import TINY

__all__ = ["Int8Activations", "activation_group", "dequantize_activations", "quantize_activations"]


def activation_group(group_size: int) -> int:
    """Columns of activations that share a scale, given a weight's group: as many as the weight's do, at most 128."""
    return group_size if group_size in (32, 64) else 128


def quantize_activations(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """x (..., K) -> integers (..., K) and scales (..., ceil(K / group_size)), both fp32.

    amax = max|x| of the group; scale = amax / 127; integer = round_half_even(x * (127 / amax)), all in fp32, so that every
    backend finds the same integers. A group with amax < 2^-100 counts as zero; one that holds an infinity or a NaN gets the
    scale NaN and integers 0.
    """
    k = x.shape[-1]
    groups = -(-k // group_size)
    grouped = torch.nn.functional.pad(x.float(), (0, -k % group_size)).unflatten(-1, (groups, group_size))
    amax = grouped.abs().amax(-1, keepdim=True)
    usable = amax.isfinite() & (amax >= TINY)
    steps = torch.full_like(amax, 127.0)  # a tensor: PyTorch turns number / tensor into number * (1 / tensor)
    inverse = torch.where(usable, steps / amax, 0.0)
    q = torch.where(usable, (grouped * inverse).round(), 0.0)
    scale = torch.where(usable, amax / steps, torch.where(amax.isfinite(), 0.0, torch.nan))
    return q.flatten(-2)[..., :k], scale.squeeze(-1)


def dequantize_activations(q: Tensor, scale: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """integer * scale, in dtype."""
    return (q.to(dtype) * scale.to(dtype).repeat_interleave(group_size, -1)[..., : q.shape[-1]]).to(dtype)


@dataclass(frozen=True, eq=False, repr=False)
class Int8Activations:
    """Activations (..., K) in int8, with a scale for each token and group of columns.

    Formula: ``x[..., k] = data[..., k] * groups[..., k // group_size, 0]``

    ``fastllm.rms_norm`` and ``fastllm.gated_activation`` return it with ``int8_group``, ``fastllm.quant_matmul`` takes it in place
    of a tensor.

    Args:
        data: (..., K) int8.
        groups: (..., G, 2) fp32, G = ceil(K / group_size): the scale of each group, and the sum of its integers, which is
            exact. (A weight's minimum multiplies their product.)
        group_size: 32, 64 or 128; the last group may be short.
        dtype: of what was rounded, and of a product's result: fp32|bf16|fp16.

    The constructor trusts its arguments; ``quant_matmul`` checks them.

    Numerics: see ``quantize_activations``. No gradient: what wants one calls ``quant_matmul(x, w, activations="int8")``.
    Units: the scale is real value per integer step.
    """

    data: Tensor
    groups: Tensor
    group_size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor, group_size: int) -> Int8Activations:
        """x (..., K), rounded in plain PyTorch."""
        q, scale = quantize_activations(x, group_size)
        sums = torch.nn.functional.pad(q, (0, -q.shape[-1] % group_size)).unflatten(-1, (scale.shape[-1], group_size)).sum(-1)
        return cls(q.to(torch.int8), torch.stack((scale, sums), -1), group_size, x.dtype)

    @property
    def shape(self) -> torch.Size:
        """(..., K)"""
        return self.data.shape

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of data and groups together."""
        return self.data.nbytes + self.groups.nbytes

    def __repr__(self) -> str:
        place = "" if self.device.type == "cpu" else f", device='{self.device}'"
        return f"Int8Activations({tuple(self.shape)}, group_size={self.group_size}, of {self.dtype}{place})"

    def to(self, device: torch.device | str) -> Int8Activations:
        """The same activations on another device."""
        return replace(self, data=self.data.to(device), groups=self.groups.to(device))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """What the integers stand for, (..., K) in dtype (default: that of what was rounded): one multiplication in fp32 (fp64 for
        fp64), rounded once."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return dequantize_activations(self.data, self.groups[..., 0], self.group_size, wide).to(dtype or self.dtype)
