"""Stored quantised formats -> QuantizedTensor, without a second rounding.

Each function takes the arrays as the format stores them and returns the canonical "rows" layout. Scales stay in their
16-bit dtype where the format's zero points are integers of one value; real-valued or varying zero points become a
minimum, and then scale and minimum are fp32, which holds ``zero * scale`` of a 16-bit scale exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastllm.errors import dtype_error, shape_error, type_error, value_error
from fastllm.quant.tensor import QuantizedTensor, store_integers

__all__ = ["from_awq", "from_gptq", "from_hqq", "from_q4_0", "from_q4_1", "from_q8_0"]

CHUNK_ROWS = 4096  # converted at a time: the temporaries of a whole vocabulary's matrix would be more than it
GGML_BLOCK = 32  # weights in a block of Q4_0, Q4_1 and Q8_0
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of an AWQ word holds column AWQ_ORDER[i] of its eight


def from_q4_0(blocks: Tensor) -> QuantizedTensor:
    """GGML Q4_0: per 32 weights an fp16 scale d and 16 bytes, ``w = d * (q - 8)``; blocks (N, K / 32 * 18) uint8."""
    scale, payload = _split_blocks("from_q4_0", blocks, fields=1, payload=16)
    return _make_q4(scale, None, payload, zero=8)


def from_q4_1(blocks: Tensor) -> QuantizedTensor:
    """GGML Q4_1: per 32 weights fp16 d and m and 16 bytes, ``w = d * q + m``; blocks (N, K / 32 * 20) uint8."""
    header, payload = _split_blocks("from_q4_1", blocks, fields=2, payload=16)
    return _make_q4(header[..., 0].contiguous(), header[..., 1].contiguous(), payload, zero=0)


def from_q8_0(blocks: Tensor) -> QuantizedTensor:
    """GGML Q8_0: per 32 weights an fp16 scale d and 32 int8, ``w = d * q``; blocks (N, K / 32 * 34) uint8."""
    scale, payload = _split_blocks("from_q8_0", blocks, fields=1, payload=32)
    n, groups, _ = payload.shape
    data = (payload ^ 0x80).view(n, groups * GGML_BLOCK)  # two's complement + 128 flips the sign bit
    return QuantizedTensor.make(data, scale[..., 0].contiguous(), zero=128, shape=data.shape, bits=8, group_size=GGML_BLOCK)


def from_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    bits: int = 4,
    zero_offset: int = 1,
) -> QuantizedTensor:
    """GPTQ: ``w[k, n] = scales[g, n] * (q[k, n] - zero[g, n])``, integers packed in int32 along K, zeros along N.

    Args:
        qweight: (K * bits / 32, N) int32.
        qzeros: (G, N * bits / 32) int32.
        scales: (G, N) fp16|bf16.
        g_idx: (K,) group of each input feature; must be k // group_size.
        bits: 4 or 8.
        zero_offset: 1 where the file stores zero - 1 (AutoGPTQ, "gptq"), 0 where it stores zero ("gptq_v2").

    Returns: the weight (N, K); zero and a 16-bit scale alone if all zeros are equal, else an fp32 minimum.
    Raises: TypeError for dtypes; ValueError for shapes that disagree, or for a g_idx out of order (act-order).
    Numerics: exact. zero - 1 wraps at the width of the field, as AutoGPTQ reads it.
    """
    op = "from_gptq"
    _check_bits(op, bits)
    if zero_offset not in (0, 1):
        raise value_error(op, "zero_offset", zero_offset, "1 (stored zero - 1) or 0 (stored zero)")
    _check(op, "qweight", qweight, (torch.int32,), 2)
    _check(op, "qzeros", qzeros, (torch.int32,), 2)
    _check(op, "scales", scales, (torch.float16, torch.bfloat16), 2)
    per_word = 32 // bits
    k, n = qweight.shape[0] * per_word, qweight.shape[1]
    group_size = _check_groups(op, k, n, scales)
    if tuple(qzeros.shape) != (scales.shape[0], n // per_word) or n % per_word:
        raise shape_error(op, "qzeros", qzeros.shape, f"({scales.shape[0]}, {n} / {per_word})", "to match scales")
    if g_idx is not None:
        _check(op, "g_idx", g_idx, (torch.int32, torch.int64), 1)
        if not torch.equal(g_idx.to(torch.int64), torch.arange(k, device=g_idx.device) // group_size):
            raise value_error(
                op, "g_idx", "out of order", f"k // {group_size}", "act-order weights keep no group of columns together"
            )
    q = _unpack_words(qweight.t(), bits)  # (N, K)
    zeros = (_unpack_words(qzeros, bits) + zero_offset) & ((1 << bits) - 1)  # (G, N)
    return _make_integer_zeros(q, scales.t(), zeros.t(), bits, group_size)


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> QuantizedTensor:
    """AWQ (gemm): ``w[k, n] = scales[g, n] * (q[k, n] - zero[g, n])``, int4 packed in int32 along N, interleaved.

    Args:
        qweight: (K, N / 8) int32, nibble i of a word is column 0, 2, 4, 6, 1, 3, 5, 7 of its eight.
        qzeros: (G, N / 8) int32, packed alike.
        scales: (G, N) fp16|bf16.

    Returns: the weight (N, K). Raises: TypeError for dtypes; ValueError for shapes that disagree. Numerics: exact.
    """
    op = "from_awq"
    _check(op, "qweight", qweight, (torch.int32,), 2)
    _check(op, "qzeros", qzeros, (torch.int32,), 2)
    _check(op, "scales", scales, (torch.float16, torch.bfloat16), 2)
    k, n = qweight.shape[0], qweight.shape[1] * 8
    group_size = _check_groups(op, k, n, scales)
    if tuple(qzeros.shape) != (scales.shape[0], n // 8):
        raise shape_error(op, "qzeros", qzeros.shape, str((scales.shape[0], n // 8)), "to match scales")
    inverse = torch.tensor([AWQ_ORDER.index(column) for column in range(8)], device=qweight.device)
    q = _unpack_words(qweight, 4).view(k, n // 8, 8)[..., inverse].reshape(k, n)
    zeros = _unpack_words(qzeros, 4).view(-1, n // 8, 8)[..., inverse].reshape(-1, n)
    return _make_integer_zeros(q.t(), scales.t(), zeros.t(), 4, group_size)


def from_hqq(
    w_q: Tensor, scale: Tensor, zero: Tensor, shape: Sequence[int], *, bits: int = 4, group_size: int = 64
) -> QuantizedTensor:
    """HQQ along axis 1: ``w = (q - zero) * scale`` with a real-valued zero, groups of consecutive columns as rows.

    Args:
        w_q: uint8. 8 bits: (N K / group_size, group_size). 4 bits: half as many rows, the high nibbles are the first half
            of the groups and the low nibbles the second.
        scale, zero: (N K / group_size, 1) or (N K / group_size,) fp16|bf16|fp32.
        shape: (N, K).

    Returns: the weight (N, K), fp32 scale and minimum = -zero * scale.
    Raises: TypeError for dtypes; ValueError for shapes that disagree.
    Numerics: zero * scale rounds once to fp32.
    """
    op = "from_hqq"
    _check_bits(op, bits)
    if len(shape) != 2 or not all(isinstance(dim, int) and dim > 0 for dim in shape):
        raise value_error(op, "shape", tuple(shape), "two positive integers (N, K)")
    n, k = shape
    if group_size < 1 or k % group_size:
        raise value_error(op, "group_size", group_size, f"a divisor of K = {k}")
    count = n * k // group_size
    _check(op, "w_q", w_q, (torch.uint8,), 2)
    stored = (count, group_size) if bits == 8 else (-(-count // 2), group_size)
    if tuple(w_q.shape) != stored or (bits == 4 and count % 2):
        raise shape_error(op, "w_q", w_q.shape, str(stored), f"for a weight {(n, k)} in groups of {group_size}")
    for name, values in (("scale", scale), ("zero", zero)):
        if not isinstance(values, Tensor):
            raise type_error(op, name, values, "a torch.Tensor")
        if not values.is_floating_point():
            raise dtype_error(op, name, values.dtype, "a floating dtype")
        if values.numel() != count:
            raise shape_error(op, name, values.shape, str((count, 1)), "one value a group")
    q = w_q if bits == 8 else torch.cat([w_q >> 4, w_q & 0x0F])
    scale = scale.to(torch.float32).reshape(n, k // group_size).contiguous()
    minimum = -(zero.to(torch.float32).reshape(scale.shape) * scale)
    return QuantizedTensor.make(
        store_integers(q.reshape(n, k), bits), scale, minimum, zero=0, shape=(n, k), bits=bits, group_size=group_size
    )


def _check(op: str, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], ndim: int) -> None:
    if not isinstance(tensor, Tensor):
        raise type_error(op, name, tensor, "a torch.Tensor")
    if tensor.dtype not in dtypes:
        raise dtype_error(op, name, tensor.dtype, " or ".join(str(dtype) for dtype in dtypes))
    if tensor.ndim != ndim or tensor.numel() == 0:
        raise shape_error(op, name, tensor.shape, f"{ndim} dims, none of them 0")


def _check_bits(op: str, bits: int) -> None:
    if bits not in (4, 8):
        raise value_error(op, "bits", bits, "4 or 8")


def _check_groups(op: str, k: int, n: int, scales: Tensor) -> int:
    groups = scales.shape[0]
    if scales.shape[1] != n or k % groups:
        raise shape_error(op, "scales", scales.shape, f"(G, {n}) with G dividing K = {k}", "to match qweight")
    return k // groups


def _split_blocks(op: str, blocks: Tensor, *, fields: int, payload: int) -> tuple[Tensor, Tensor]:
    """(N, G * block bytes) -> fp16 header (N, G, fields) and payload bytes (N, G, payload)."""
    _check(op, "blocks", blocks, (torch.uint8,), 2)
    size = 2 * fields + payload
    n, width = blocks.shape
    if width % size:
        raise shape_error(op, "blocks", blocks.shape, f"(N, a multiple of {size})", f"the bytes of {GGML_BLOCK} weights")
    grouped = blocks.view(n, width // size, size) if blocks.is_contiguous() else blocks.reshape(n, -1, size)
    header = grouped[..., : 2 * fields].contiguous().view(torch.float16)
    return header, grouped[..., 2 * fields :]


def _make_q4(scale: Tensor, minimum: Tensor | None, payload: Tensor, zero: int) -> QuantizedTensor:
    """GGML's 4-bit payload: byte j of a block holds weight j in its low nibble and weight 16 + j in its high one."""
    n, groups = payload.shape[:2]
    data = payload.new_empty((n, groups, 16))
    for start in range(0, n, CHUNK_ROWS):
        rows, out = payload[start : start + CHUNK_ROWS], data[start : start + CHUNK_ROWS]
        even, odd = rows[..., 0::2], rows[..., 1::2]
        out[..., :8] = (even & 0x0F) | (odd << 4)
        out[..., 8:] = (even >> 4) | (odd & 0xF0)
    return QuantizedTensor.make(
        data.view(n, groups * 16),
        scale.reshape(n, groups),
        minimum,
        zero=zero,
        shape=(n, groups * GGML_BLOCK),
        bits=4,
        group_size=GGML_BLOCK,
    )


def _unpack_words(words: Tensor, bits: int) -> Tensor:
    """(R, C) int32 -> (R, C * 32 / bits) uint8, low bits first."""
    words = words.contiguous()
    octets = words.view(torch.uint8).view(words.shape[0], -1)  # little-endian: the low byte comes first
    if bits == 8:
        return octets
    return torch.stack([octets & 0x0F, octets >> 4], dim=-1).view(words.shape[0], -1)


def _make_integer_zeros(q: Tensor, scale: Tensor, zeros: Tensor, bits: int, group_size: int) -> QuantizedTensor:
    """(q - zero) * scale with integer zeros (N, G): one shared zero stays an integer, varying ones become a minimum."""
    shared = int(zeros[0, 0])
    if bool((zeros == shared).all()):
        minimum, zero = None, shared
        scale = scale.contiguous()
    else:
        scale = scale.to(torch.float32).contiguous()
        minimum, zero = -(zeros.to(torch.float32).contiguous() * scale), 0
    return QuantizedTensor.make(
        store_integers(q, bits), scale, minimum, zero=zero, shape=q.shape, bits=bits, group_size=group_size
    )
