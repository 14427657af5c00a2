"""LLaMA on a page: Llama 1/2/3, SmolLM2, TinyLlama, Mistral, Qwen2 and Qwen3 are this with other numbers.

Touvron et al. 2023, https://arxiv.org/abs/2302.13971. Shapes: B sequences of T tokens, H query heads and Hk key/value heads of
D, S keys. ``ops`` is any namespace with fastllm's ops: ``fastllm.ops`` itself, or ``fastllm.models.reference_ops``, whose
functions are plain PyTorch.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops as fused_ops
from ..nn.cache import CachedLayer, KVCache, Places
from ..nn.rope import RopeTables
from ..ops._op import outputs_in
from ..ops.attention.native import DECODE_ROWS
from ..pages import Scratch
from ..quant import Int8Activations, QuantizedTensor, activation_group
from .loaders import ModelConfig

__all__ = ["Layer", "Llama", "Weights"]

WIDEST_ACTIVATION = 8 << 20  # bytes, of a prompt's tokens
KEPT_CACHE = 256 << 20  # bytes, at most, of a used cache that waits for the next one

Weight = Tensor | QuantizedTensor  # (N, K)


@dataclass(frozen=True)
class Layer:
    """One block. Matrices that read the same input are one matrix, their rows one below the other."""

    attention_norm: Tensor  # (hidden,)
    qkv: Weight  # ((H + 2 Hk) D, hidden)
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # (D,): Qwen3
    k_norm: Tensor | None
    o: Weight  # (hidden, H D)
    mlp_norm: Tensor  # (hidden,)
    gate_up: Weight  # (2 intermediate, hidden)
    down: Weight  # (hidden, intermediate)


@dataclass(frozen=True)
class Weights:
    embedding: Weight  # (V, hidden)
    layers: list[Layer]
    norm: Tensor  # (hidden,)
    head: Weight  # (V, hidden); the embedding itself where they are tied


class Llama:
    """The forward pass, over weights that someone else loaded.

    Args:
        config: shapes and constants.
        weights: matrices in ``dtype``, or quantised.
        rope: cos and sin for every position.
        dtype: of activations.
        cache_dtype: of the key/value cache: dtype, bf16 or fp16 with fp32, or int8.
        activations: "float", or "int8": how quantised matrices see their input (``quant_matmul``).
        ops: the ops to compute with.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        rope: RopeTables,
        *,
        dtype: torch.dtype = torch.float32,
        cache_dtype: torch.dtype | None = None,
        activations: str = "float",
        ops: Any = fused_ops,
    ) -> None:
        self.config, self.weights, self.rope = config, weights, rope
        self.dtype, self.cache_dtype = dtype, cache_dtype or dtype
        self.activations, self.ops = activations, ops
        self._used_cache: deque[KVCache] = deque(maxlen=1)  # whose methods are atomic: threads may share a model
        self._used_scratch: deque[Scratch] = deque(maxlen=1)

    @property
    def kernel_calls(self) -> int:
        """Kernels that ``hidden_states`` and ``head`` launch together where all of them are fastllm's."""
        a_layer = 11 if self.config.qk_norm else 9
        return 1 + a_layer * self.config.num_layers + 2  # the embedding before, the last norm and the head after

    @property
    def prefill_tokens(self) -> int:
        """Tokens of a prompt that go through the model at once. On a CPU as many as the matrix kernels take in one pass over the
        weights: with fewer, unpacking weights and calling kernels from Python (tens of microseconds each, once weights have gone
        through the caches) would show. Half as many where the widest activation would show in the process's peak memory, which costs
        a little speed. A GPU needs more to be busy."""
        if self.device.type != "cpu":
            return 2048
        widest = 512 * 2 * self.config.intermediate_size * self.dtype.itemsize
        return 512 if widest <= WIDEST_ACTIVATION else 256

    @property
    def device(self) -> torch.device:
        """Where weights, cache, ids and logits live."""
        return self.rope.cos.device

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache, in the memory of the one that was given back where it fits."""
        c = self.config
        with torch.inference_mode(False):  # a cache may outlive the mode, and what is made in it can't be written to outside
            with contextlib.suppress(IndexError):
                used = self._used_cache.pop()
                if (used.batch, used.dtype) == (batch, self.cache_dtype) and used.capacity >= capacity:
                    return used.emptied(capacity)
            return KVCache(c.num_layers, batch, c.num_kv_heads, capacity, c.head_dim, self.cache_dtype, self.device)

    def give_back(self, cache: KVCache) -> None:
        """A cache that nothing looks at any more: the next one may have its memory. The system takes longer to hand out a page
        than a short prompt's kernels take to fill it."""
        cache = cache.whole or cache
        if self.device.type == "cpu" and cache.nbytes <= KEPT_CACHE:
            self._used_cache.append(cache)

    @property
    def parts(self) -> tuple[object, ...]:
        """What hidden_states computes with: as long as these are the same objects, its calls for the same places are the same."""
        return (self.weights, *self.weights.layers, self.rope, self.ops, self.activations, self.dtype, self.config)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Scratch | None]:
        """A context for passes of many tokens: their activations go into the memory of the last one's, which the model keeps. On a
        GPU there is none: PyTorch's allocator does that."""
        if self.device.type != "cpu":
            yield None
            return
        memory = Scratch()
        with contextlib.suppress(IndexError):
            memory = self._used_scratch.pop()
        with outputs_in(memory):
            yield memory
        memory.end_pass()
        if memory.worth_keeping:
            self._used_scratch.append(memory)

    def query_runs(self, tokens: int) -> int:
        """In how many runs attention is to take a sequence's next ``tokens`` queries (``Places.kv_lens``), so that each of them gets
        the bits it would get alone on the CPU: the kernel for few queries must serve them, which cuts keys by position alone; but
        with a window it cuts from the first key that the first query sees."""
        if self.device.type != "cpu":
            return 1
        c = self.config
        most = 1 if c.sliding_window else max(1, DECODE_ROWS // (c.num_heads // c.num_kv_heads))
        return next(runs for runs in range(1, tokens + 1) if tokens % runs == 0 and tokens // runs <= most)

    def attend(self, q: Tensor, seen: CachedLayer, kv_lens: Tensor | None) -> Tensor:
        """q (B, H, T, D), keys and values (B, Hk, S, D) -> (B, H, T, D), of memory (B, T, H, D)."""
        c, B = self.config, len(q)
        if kv_lens is None or kv_lens.dim() == 1:
            scales = {} if seen.k_scale is None else {"k_scale": seen.k_scale, "v_scale": seen.v_scale}
            return self.ops.attention(
                q, seen.keys, seen.values, causal=True, window=c.sliding_window, kv_lens=kv_lens, **scales
            )
        runs = kv_lens.shape[1]
        if runs == 1:
            return self.attend(q, seen, kv_lens[:, 0])
        if B > 1:  # nothing without a copy stands for (B, R) sequences of B caches
            each = [self.attend(q[b : b + 1], seen.row(b), kv_lens[b : b + 1]) for b in range(B)]
            return torch.cat([o.transpose(1, 2) for o in each]).transpose(1, 2)
        # The runs are R sequences that share one cache.
        shared = seen.map(lambda t: t.expand(runs, *t.shape[1:]))
        o = self.attend(q[0].unflatten(1, (runs, -1)).transpose(0, 1), shared, kv_lens[0])
        return o.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2)

    def int8_group(self, weight: Weight) -> int | None:
        """In groups of how many columns the norm or gate before ``weight`` is to write int8: the weight's matrix product then need
        not round. None where it does not round, and where a gradient could be wanted, which integers have none of."""
        if self.activations != "int8" or not isinstance(weight, QuantizedTensor) or torch.is_grad_enabled():
            return None
        return activation_group(weight.group_size)

    def linear(self, x: Tensor | Int8Activations, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """(..., K) -> (..., N). Float matrices are PyTorch's own: oneDNN and MKL are hard to beat there."""
        if isinstance(weight, QuantizedTensor) or isinstance(x, Int8Activations):
            return self.ops.quant_matmul(x, weight, bias, activations=self.activations)
        return torch.nn.functional.linear(x, weight, bias)

    def hidden_states(self, ids: Tensor, cache: KVCache, places: Places | None = None, *, last: bool = False) -> Tensor:
        """Token ids (B, T) -> hidden states (B, T, hidden) after the last norm; keys and values join the cache.

        Sequences may have different lengths: token t of sequence b stands at position ``cache.lengths[b] + t``, unless
        ``places`` says otherwise. The caller advances ``cache.lengths``.

        Args:
            last: only the last token's hidden state is wanted, (B, 1, hidden), as of a prompt: of the others the last layer then
                computes no more than keys and values. Not with ``places`` of several runs.
        """
        c, w, ops = self.config, self.weights, self.ops
        B, T = ids.shape
        H, Hk, D = c.num_heads, c.num_kv_heads, c.head_dim
        at = places or cache.places(T)

        x = ops.embedding(ids, w.embedding, dtype=self.dtype)  # (B, T, hidden)
        delta = None  # what the last block has still to add to x: the next norm does it
        for i, layer in enumerate(w.layers):
            group = self.int8_group(layer.qkv)
            if delta is None:
                h = ops.rms_norm(x, layer.attention_norm, c.rms_norm_eps, int8_group=group)
            else:
                h, x = ops.rms_norm(delta, layer.attention_norm, c.rms_norm_eps, residual=x, int8_group=group)
            qkv = self.linear(h, layer.qkv, layer.qkv_bias).view(B, T, H + 2 * Hk, D).transpose(1, 2)
            q, k, v = qkv[:, :H], qkv[:, H : H + Hk], qkv[:, H + Hk :]  # (B, H | Hk, T, D)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = (ops.rms_norm(t, n, c.rms_norm_eps) for t, n in ((q, layer.q_norm), (k, layer.k_norm)))
            into = cache.layers[i]
            scales = {} if into.k_scale is None else {"k_scale": into.k_scale, "v_scale": into.v_scale}
            q = ops.apply_rotary_cache(q, k, v, self.rope.cos, self.rope.sin, into.keys, into.values, at.positions, **scales)
            if last and i == c.num_layers - 1:
                q, x, T = q[:, :, -1:], x[:, -1:], 1
            o = self.attend(q, into.map(lambda t: t[:, :, : at.keys]), at.kv_lens)
            delta = self.linear(o.transpose(1, 2).reshape(B, T, H * D), layer.o)
            h, x = ops.rms_norm(delta, layer.mlp_norm, c.rms_norm_eps, residual=x, int8_group=self.int8_group(layer.gate_up))
            h = ops.gated_activation(self.linear(h, layer.gate_up), int8_group=self.int8_group(layer.down))
            delta = self.linear(h, layer.down)
        return ops.rms_norm(delta, w.norm, c.rms_norm_eps, residual=x)[0]

    def head(self, hidden: Tensor) -> Tensor:
        """(..., hidden) -> logits (..., V)."""
        return self.linear(hidden, self.weights.head)

    def losses(self, hidden: Tensor, target: Tensor) -> Tensor:
        """(..., hidden) and the tokens that follow (...) -> their negative log-likelihoods (...), fp32; no logits are kept."""
        loss: Tensor = self.ops.cross_entropy(hidden, self.weights.head, target, activations=self.activations)
        return loss
