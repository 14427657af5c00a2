"""The ops of the thin LLaMA in plain PyTorch, with the signatures of ``fastllm.ops``: what the fused model is compared with."""

from __future__ import annotations

from ..ops.attention.reference import attention
from ..ops.cross_entropy.reference import cross_entropy
from ..ops.embedding.reference import embedding
from ..ops.gated_activation.reference import gated_activation
from ..ops.quant_matmul.reference import quant_matmul
from ..ops.rms_norm.reference import rms_norm
from ..ops.rotary.reference import apply_rotary_cache

__all__ = ["apply_rotary_cache", "attention", "cross_entropy", "embedding", "gated_activation", "quant_matmul", "rms_norm"]
