"""What each public function says to input that it can't take. ``python tests/test_bad_input.py`` prints the whole list.

Every text must name the op, the argument, what it got and what it expected; nothing may crash, and nothing may be answered
wrongly in silence. Files are treated in test_loaders.py, token ids and model options in test_models.py, sampling in
test_generation.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import fastllm
from fastllm.quant import Int8Activations, QuantizedTensor, quantize_rows

K, N = 64, 32
X = torch.randn(3, K, generator=torch.Generator().manual_seed(0))
W = torch.ones(K)
MATRIX = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
Q = fastllm.quantize(MATRIX, bits=4, group_size=32)
R = Int8Activations.of(X, 32)
HEADS, KEYS = torch.randn(2, 4, 5, 32), torch.randn(2, 2, 5, 32)
COS = torch.randn(1, 5, 32)
CACHE = torch.zeros(2, 2, 8, 32)
POSITIONS = torch.arange(5)
IDS = torch.tensor([[1, 2]])
NEXT = torch.tensor([0, 1, 31])
POOL = torch.randn(4, 2, 8, 32)
TABLE, LENS = torch.tensor([[0, 1], [2, 3]]), torch.tensor([9, 16])
INT8, SCALE = torch.ones(2, 2, 5, 32, dtype=torch.int8), torch.ones(2, 2, 5)

norm, rotary, cache_write = fastllm.rms_norm, fastllm.apply_rotary, fastllm.apply_rotary_cache
attend, gate, matmul = fastllm.attention, fastllm.gated_activation, fastllm.quant_matmul
quantize, embed, entropy = fastllm.quantize, fastllm.embedding, fastllm.cross_entropy


def paged(block_table: Any, lens: Any = LENS, pool: Any = POOL, **others: Any) -> Any:
    return attend(HEADS, pool, pool, kv_lens=lens, block_table=block_table, **others)


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    # ---------------------------------------------------------------- rms_norm
    (lambda: norm([1.0], W), TypeError, "rms_norm: x is a list"),
    (lambda: norm(None, W), TypeError, "rms_norm: x is a NoneType"),
    (lambda: norm(X.double(), W), TypeError, "rms_norm: x has dtype torch.float64"),
    (lambda: norm(X.long(), W), TypeError, "rms_norm: x has dtype torch.int64"),
    (lambda: norm(X.to_sparse(), W), TypeError, "rms_norm: x has layout torch.sparse_coo"),
    (lambda: norm(X, W.bfloat16()), TypeError, "rms_norm: weight has dtype torch.bfloat16"),
    (lambda: norm(X, W.to("meta")), ValueError, "rms_norm: weight is on meta"),
    (lambda: norm(X, torch.ones(K + 1)), ValueError, "rms_norm: weight has shape (65,)"),
    (lambda: norm(X, torch.ones(1, K)), ValueError, "rms_norm: weight has shape (1, 64)"),
    (lambda: norm(torch.tensor(1.0), W), ValueError, "rms_norm: x has shape ()"),
    (lambda: norm(torch.empty(3, 0), torch.empty(0)), ValueError, "rms_norm: x has shape (3, 0)"),
    (lambda: norm(X, W, residual=X[:2]), ValueError, "rms_norm: residual has shape (2, 64)"),
    (lambda: norm(X, W, residual=X.half()), TypeError, "rms_norm: residual has dtype torch.float16"),
    (lambda: norm(X, W, math.nan), ValueError, "rms_norm: eps is nan"),
    (lambda: norm(X, W, -1e-6), ValueError, "rms_norm: eps is -1e-06"),
    (lambda: norm(X, W, math.inf), ValueError, "rms_norm: eps is inf"),
    (lambda: norm(X, W, "1e-6"), TypeError, "rms_norm: eps is a str"),
    (lambda: norm(X, W, offset=math.nan), ValueError, "rms_norm: offset is nan"),
    (lambda: norm(X, W, rounding="qwen"), ValueError, "rms_norm: rounding is 'qwen'"),
    (lambda: norm(X, W, int8_group=16), ValueError, "rms_norm: int8_group is 16, expected None, 32, 64 or 128"),
    (lambda: norm(X, W, int8_group="32"), TypeError, "rms_norm: int8_group is a str"),
    (lambda: norm(X, W, int8_group=True), TypeError, "rms_norm: int8_group is a bool"),
    # ---------------------------------------------------------------- apply_rotary
    (lambda: rotary(HEADS, KEYS.half(), COS, COS), TypeError, "apply_rotary: k has dtype torch.float16"),
    (lambda: rotary(HEADS[0], KEYS, COS, COS), ValueError, "apply_rotary: q has shape (4, 5, 32)"),
    (lambda: rotary(HEADS, KEYS[:1], COS, COS), ValueError, "apply_rotary: k has shape (1, 2, 5, 32)"),
    (lambda: rotary(HEADS, KEYS, COS[:, :4], COS[:, :4]), ValueError, "apply_rotary: cos has shape (1, 4, 32)"),
    (lambda: rotary(HEADS, KEYS, COS, COS[..., :16]), ValueError, "apply_rotary: sin has shape (1, 5, 16)"),
    (lambda: rotary(HEADS, KEYS, COS[..., :15], COS[..., :15]), ValueError, "apply_rotary: cos has shape (1, 5, 15)"),
    (lambda: rotary(HEADS, KEYS, COS.long(), COS), TypeError, "apply_rotary: cos has dtype torch.int64"),
    (lambda: rotary(HEADS, KEYS, None, COS), TypeError, "apply_rotary: cos is a NoneType"),
    # ---------------------------------------------------------------- apply_rotary_cache
    (
        lambda: cache_write(HEADS, KEYS, KEYS, COS, COS, CACHE, CACHE.clone(), POSITIONS + 4),
        ValueError,
        "apply_rotary_cache: ",
    ),
    (
        lambda: cache_write(HEADS, KEYS, KEYS, COS, COS, CACHE, CACHE.clone(), POSITIONS - 1),
        ValueError,
        "apply_rotary_cache: ",
    ),
    (
        lambda: cache_write(HEADS, KEYS, KEYS, COS, COS, CACHE, CACHE.clone(), POSITIONS.float()),
        TypeError,
        "apply_rotary_cache: positions has dtype torch.float32",
    ),
    (
        lambda: cache_write(HEADS, KEYS, KEYS, COS, COS, CACHE, CACHE.clone(), POSITIONS[:3]),
        ValueError,
        "apply_rotary_cache: positions has shape (3,)",
    ),
    (
        lambda: cache_write(HEADS, KEYS, KEYS, COS, COS, CACHE[:1], CACHE.clone(), POSITIONS),
        ValueError,
        "apply_rotary_cache: k_cache has shape (1, 2, 8, 32)",
    ),
    (
        lambda: cache_write(HEADS, KEYS, KEYS[:, :1], COS, COS, CACHE, CACHE.clone(), POSITIONS),
        ValueError,
        "apply_rotary_cache: v has shape (2, 1, 5, 32)",
    ),
    # ---------------------------------------------------------------- attention
    (lambda: attend(HEADS, KEYS, KEYS.bfloat16()), TypeError, "attention: v has dtype torch.bfloat16"),
    (lambda: attend(HEADS.double(), KEYS, KEYS), TypeError, "attention: q has dtype torch.float64"),
    (lambda: attend(HEADS, KEYS[..., :16], KEYS), ValueError, "attention: k has shape (2, 2, 5, 16)"),
    (lambda: attend(HEADS[:, :3], KEYS, KEYS), ValueError, "attention: k has shape (2, 2, 5, 32)"),
    (lambda: attend(HEADS, KEYS, KEYS[:, :, :4]), ValueError, "attention: v has shape (2, 2, 4, 32)"),
    (lambda: attend(HEADS[0], KEYS, KEYS), ValueError, "attention: q has shape (4, 5, 32)"),
    (lambda: attend(HEADS, KEYS, KEYS, scale=math.nan), ValueError, "attention: scale is nan"),
    (lambda: attend(HEADS, KEYS, KEYS, window=0), ValueError, "attention: window is 0"),
    (lambda: attend(HEADS, KEYS, KEYS, window=-3), ValueError, "attention: window is -3"),
    (lambda: attend(HEADS, KEYS, KEYS, softcap=0.0), ValueError, "attention: softcap is 0.0"),
    (lambda: attend(HEADS, KEYS, KEYS, causal="yes"), TypeError, "attention: causal is a str"),
    (lambda: attend(HEADS, KEYS, KEYS, mask=torch.ones(5, 4).bool()), ValueError, "attention: mask has shape (5, 4)"),
    (lambda: attend(HEADS, KEYS, KEYS, mask=torch.ones(5, 5).long()), TypeError, "attention: mask has dtype torch.int64"),
    (lambda: attend(HEADS, KEYS, KEYS, kv_lens=torch.tensor([1])), ValueError, "attention: kv_lens has shape (1,)"),
    (lambda: attend(HEADS, KEYS, KEYS, kv_lens=torch.tensor([1.0, 2.0])), TypeError, "attention: kv_lens has dtype"),
    (lambda: attend(HEADS, KEYS, KEYS, kv_lens=torch.tensor([1, 6])), ValueError, "attention: kv_lens"),
    (lambda: attend(HEADS, KEYS, KEYS, kv_lens=torch.tensor([-1, 3])), ValueError, "attention: kv_lens"),
    (lambda: attend(HEADS, KEYS, KEYS, kv_lens=[5, 5]), TypeError, "attention: kv_lens is a list"),
    (lambda: attend(HEADS, KEYS, KEYS, sinks=torch.zeros(3)), ValueError, "attention: sinks has shape (3,)"),
    (lambda: paged([[0, 1]]), TypeError, "attention: block_table is a list"),
    (lambda: paged(TABLE.float()), TypeError, "attention: block_table has dtype torch.float32"),
    (lambda: paged(TABLE[:1]), ValueError, "attention: block_table has shape (1, 2)"),
    (lambda: paged(TABLE[0]), ValueError, "attention: block_table has shape (2,)"),
    (lambda: paged(TABLE.to("meta")), ValueError, "attention: block_table is on meta"),
    (lambda: paged(TABLE, lens=None), TypeError, "attention: kv_lens is a NoneType"),
    (lambda: paged(TABLE, lens=torch.tensor([17, 3])), ValueError, "attention: kv_lens[0] is 17, expected 0 to 16"),
    (lambda: paged(TABLE, lens=torch.tensor([1, -3])), ValueError, "attention: kv_lens[1] is -3"),
    (lambda: paged(TABLE + 1), ValueError, "attention: block_table[1, 1] is 4, expected 0 to 3"),
    (lambda: paged(TABLE - 1), ValueError, "attention: block_table[0, 0] is -1, expected 0 to 3"),
    (lambda: paged(TABLE, pool=POOL[:0]), ValueError, "attention: k has shape (0, 2, 8, 32)"),
    (lambda: paged(TABLE, pool=POOL[:, :, :0]), ValueError, "attention: k has shape (4, 2, 0, 32)"),
    (lambda: paged(TABLE, pool=POOL[..., :16]), ValueError, "attention: k has shape (4, 2, 8, 16)"),
    (lambda: paged(TABLE, pool=POOL[:, :1].expand(4, 3, 8, 32)), ValueError, "attention: k has shape (4, 3, 8, 32)"),
    (lambda: paged(TABLE, mask=torch.ones(5, 5).bool()), ValueError, "attention: mask has shape (5, 5)"),
    (lambda: paged(TABLE, k_scale=torch.ones(4, 2, 8)), TypeError, "attention: k has dtype torch.float32"),
    (lambda: attend(HEADS, INT8, INT8), TypeError, "attention: k has dtype torch.int8"),
    (lambda: attend(HEADS, INT8, KEYS, k_scale=SCALE, v_scale=SCALE), TypeError, "attention: v has dtype torch.float32"),
    (lambda: attend(HEADS, INT8, INT8, k_scale=SCALE), TypeError, "attention: v_scale is a NoneType"),
    (lambda: attend(HEADS, INT8, INT8, v_scale=SCALE), TypeError, "attention: k_scale is a NoneType"),
    (
        lambda: attend(HEADS, INT8, INT8, k_scale=SCALE.half(), v_scale=SCALE),
        TypeError,
        "attention: k_scale has dtype torch.float16",
    ),
    (
        lambda: attend(HEADS, INT8, INT8, k_scale=SCALE, v_scale=SCALE[:, :1]),
        ValueError,
        "attention: v_scale has shape (2, 1, 5)",
    ),
    (lambda: attend(HEADS, INT8, INT8, k_scale=SCALE.to("meta"), v_scale=SCALE), ValueError, "attention: k_scale is on meta"),
    (lambda: quantize_rows([1.0]), TypeError, "quantize_rows: x is a list"),
    (lambda: quantize_rows(X.double()), TypeError, "quantize_rows: x has dtype torch.float64"),
    (lambda: quantize_rows(torch.tensor(1.0)), ValueError, "quantize_rows: x has shape ()"),
    (lambda: quantize_rows(X[:, :0]), ValueError, "quantize_rows: x has shape (3, 0)"),
    # ---------------------------------------------------------------- gated_activation
    (lambda: gate(X, X[:2]), ValueError, "gated_activation: up has shape (2, 64)"),
    (lambda: gate(X, X.half()), TypeError, "gated_activation: up has dtype torch.float16"),
    (lambda: gate(X[:, :3]), ValueError, "gated_activation: gate has shape (3, 3)"),
    (lambda: gate(X, X, activation="relu"), ValueError, "gated_activation: activation is 'relu'"),
    (lambda: gate(X.long(), X), TypeError, "gated_activation: gate has dtype torch.int64"),
    (lambda: gate("x", X), TypeError, "gated_activation: gate is a str"),
    (lambda: gate(X, X, int8_group=-1), ValueError, "gated_activation: int8_group is -1, expected None, 32, 64 or 128"),
    # ---------------------------------------------------------------- quantize, quant_matmul, embedding
    (lambda: quantize(MATRIX, bits=3), ValueError, "quantize: bits is 3"),
    (lambda: quantize(MATRIX, bits="4"), ValueError, "quantize: bits is '4'"),
    (lambda: quantize(MATRIX, group_size=48), ValueError, "quantize: group_size is 48"),
    (lambda: quantize(MATRIX[:, :48], group_size=32), ValueError, "quantize: group_size is 32"),
    (lambda: quantize(MATRIX, group_size=-2), ValueError, "quantize: group_size is -2"),
    (lambda: quantize(W), ValueError, "quantize: weight has shape (64,)"),
    (lambda: quantize(torch.empty(0, 64)), ValueError, "quantize: weight has shape (0, 64)"),
    (lambda: quantize(MATRIX.long()), TypeError, "quantize: weight has dtype torch.int64"),
    (lambda: quantize(MATRIX * math.nan), ValueError, "quantize: weight"),
    (lambda: quantize(MATRIX * math.inf), ValueError, "quantize: weight"),
    (lambda: matmul(X, MATRIX), TypeError, "quant_matmul: w is a Tensor"),
    (lambda: matmul(X[:, :32], Q), ValueError, "quant_matmul: x has shape (3, 32)"),
    (lambda: matmul(X.double(), Q), TypeError, "quant_matmul: x has dtype torch.float64"),
    (lambda: matmul(torch.tensor(1.0), Q), ValueError, "quant_matmul: x has shape ()"),
    (lambda: matmul(X, Q, torch.zeros(5)), ValueError, "quant_matmul: bias has shape (5,)"),
    (lambda: matmul(X, Q, torch.zeros(N).half()), TypeError, "quant_matmul: bias has dtype torch.float16"),
    (lambda: matmul(X, Q, activations="int4"), ValueError, "quant_matmul: activations is 'int4'"),
    (lambda: matmul(R, MATRIX), TypeError, "quant_matmul: w is a Tensor"),
    (lambda: matmul(R, Q, activations="int4"), ValueError, "quant_matmul: activations is 'int4'"),
    (lambda: matmul(norm(X, W, int8_group=128), Q), ValueError, "quant_matmul: group_size of x is 128, expected 32"),
    (lambda: matmul(norm(X[:, :32], None, int8_group=32), Q), ValueError, "quant_matmul: x has shape (3, 32)"),
    (lambda: matmul(R, Q, torch.zeros(N).half()), TypeError, "quant_matmul: bias has dtype torch.float16"),
    (lambda: matmul(replace(R, dtype=torch.float64), Q), TypeError, "quant_matmul: x has dtype torch.float64"),
    (lambda: matmul(replace(R, data=R.data.short()), Q), TypeError, "quant_matmul: x.data has dtype torch.int16"),
    (lambda: matmul(replace(R, groups=R.groups.half()), Q), TypeError, "quant_matmul: x.groups has dtype torch.float16"),
    (lambda: matmul(replace(R, groups=R.groups[..., :1]), Q), ValueError, "quant_matmul: x.groups has shape (3, 2, 1)"),
    (lambda: matmul(replace(R, groups=None), Q), TypeError, "quant_matmul: x.groups is a NoneType"),
    (lambda: matmul(R.to("meta"), Q), ValueError, "quant_matmul: w is on cpu, expected meta"),
    (
        lambda: QuantizedTensor.make(Q.data, Q.scale, Q.minimum, zero=16, shape=(N, K), bits=4, group_size=32),
        ValueError,
        "QuantizedTensor: zero is 16",
    ),
    (
        lambda: QuantizedTensor.make(Q.data[:, :5], Q.scale, Q.minimum, zero=0, shape=(N, K), bits=4, group_size=32),
        ValueError,
        "QuantizedTensor: data has shape (32, 5)",
    ),
    (lambda: embed(torch.tensor([N]), Q), ValueError, "embedding: "),
    (lambda: embed(torch.tensor([-1]), Q), ValueError, "embedding: "),
    (lambda: embed(torch.tensor([1.0]), Q), TypeError, "embedding: ids has dtype torch.float32"),
    (lambda: embed([1, 2], Q), TypeError, "embedding: ids is a list"),
    (lambda: embed(IDS, Q, dtype=torch.float64), TypeError, "embedding: dtype"),
    # ---------------------------------------------------------------- cross_entropy
    (lambda: entropy([1.0], MATRIX, NEXT), TypeError, "cross_entropy: hidden is a list"),
    (lambda: entropy(X.double(), MATRIX, NEXT), TypeError, "cross_entropy: hidden has dtype torch.float64"),
    (lambda: entropy(torch.tensor(1.0), MATRIX, NEXT), ValueError, "cross_entropy: hidden has shape ()"),
    (lambda: entropy(X[:, :32], MATRIX, NEXT), ValueError, "cross_entropy: hidden has shape (3, 32)"),
    (lambda: entropy(X[:, :32], Q, NEXT), ValueError, "cross_entropy: hidden has shape (3, 32)"),
    (lambda: entropy(X, MATRIX.numpy(), NEXT), TypeError, "cross_entropy: weight is a ndarray"),
    (lambda: entropy(X, MATRIX.half(), NEXT), TypeError, "cross_entropy: weight has dtype torch.float16"),
    (lambda: entropy(X, MATRIX[0], NEXT), ValueError, "cross_entropy: weight has shape (64,)"),
    (lambda: entropy(X, MATRIX[:0], NEXT), ValueError, "cross_entropy: weight has shape (0, 64)"),
    (lambda: entropy(X, MATRIX.to("meta"), NEXT), ValueError, "cross_entropy: weight is on meta"),
    (lambda: entropy(X, Q.to("meta"), NEXT), ValueError, "cross_entropy: weight is on meta"),
    (lambda: entropy(X, MATRIX, [1, 2, 3]), TypeError, "cross_entropy: target is a list"),
    (lambda: entropy(X, MATRIX, NEXT.int()), TypeError, "cross_entropy: target has dtype torch.int32"),
    (lambda: entropy(X, MATRIX, NEXT[:2]), ValueError, "cross_entropy: target has shape (2,)"),
    (lambda: entropy(X, MATRIX, NEXT.to("meta")), ValueError, "cross_entropy: target is on meta"),
    (lambda: entropy(X, MATRIX, NEXT + N), ValueError, "cross_entropy: target holds 32"),
    (lambda: entropy(X, Q, NEXT - 1), ValueError, "cross_entropy: target holds -1"),
    (lambda: entropy(X, Q, NEXT - 100, ignore_index=0), ValueError, "cross_entropy: target holds -100"),
    (lambda: entropy(X, MATRIX, NEXT, softcap=0.0), ValueError, "cross_entropy: softcap is 0.0"),
    (lambda: entropy(X, MATRIX, NEXT, softcap=math.inf), ValueError, "cross_entropy: softcap is inf"),
    (lambda: entropy(X, MATRIX, NEXT, softcap="30"), TypeError, "cross_entropy: softcap is a str"),
    (lambda: entropy(X, MATRIX, NEXT, ignore_index=None), TypeError, "cross_entropy: ignore_index is a NoneType"),
    (lambda: entropy(X, MATRIX, NEXT, activations="int4"), ValueError, "cross_entropy: activations is 'int4'"),
    (lambda: entropy(X, MATRIX, NEXT, reduction="max"), ValueError, "cross_entropy: reduction is 'max'"),
    # ---------------------------------------------------------------- choices
    (lambda: fastllm.use_backend("tpu").__enter__(), ValueError, "use_backend: name is 'tpu'"),
    (lambda: fastllm.explain("rms_morn", X, W), ValueError, "rms_morn"),
    (lambda: fastllm.load("no/such/file.gguf"), FileNotFoundError, "no/such/file.gguf"),
    (lambda: fastllm.load("x.gguf", device="tpu"), ValueError, "load: device is 'tpu'"),
    (lambda: fastllm.load("x.gguf", device="mps"), ValueError, "load: device is 'mps'"),
]


def sentence(call: Callable[[], Any]) -> tuple[type[BaseException], str]:
    try:
        value = call()
    except Exception as error:
        return type(error), str(error)
    raise AssertionError(f"expected an error, got {value!r}")


@pytest.mark.parametrize(("call", "error", "text"), BAD, ids=[f"{i}-{text}" for i, (_, _, text) in enumerate(BAD)])
def test_bad_input_gets_a_typed_error_in_words(call, error, text):
    kind, said = sentence(call)
    assert kind is error
    assert said.startswith(text) or text in said
    assert "expected" in said


GOOD_BUT_ODD: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "norm, no rows": (lambda: norm(torch.empty(0, K), W), lambda: torch.empty(0, K)),
    "norm, transposed x": (lambda: norm(X.T.contiguous().T, W), lambda: norm(X, W)),
    "norm, expanded x": (lambda: norm(X[:1].expand(3, K), W), lambda: norm(X[:1].repeat(3, 1), W)),
    "norm, negative offset view": (lambda: norm(X.flip(0), W), lambda: norm(X.flip(0).clone(), W)),
    "gate, no rows": (lambda: gate(torch.empty(0, 8), torch.empty(0, 8)), lambda: torch.empty(0, 8)),
    "gate, transposed": (lambda: gate(X.T, X.T), lambda: gate(X.T.contiguous(), X.T.contiguous())),
    "matmul, no rows": (lambda: matmul(torch.empty(0, K), Q), lambda: torch.empty(0, N)),
    "matmul, one vector": (lambda: matmul(X[0], Q), lambda: matmul(X[:1], Q)[0]),
    "matmul, transposed x": (lambda: matmul(X.T.contiguous().T, Q), lambda: matmul(X, Q)),
    "cross_entropy, no tokens": (lambda: entropy(X[:0], Q, NEXT[:0]), lambda: torch.empty(0)),
    "cross_entropy, one vector": (lambda: entropy(X[0], Q, NEXT[0]), lambda: entropy(X[:1], Q, NEXT[:1])[0]),
    "cross_entropy, transposed all": (
        lambda: entropy(X.T.contiguous().T, MATRIX.T.contiguous().T, torch.stack((NEXT, NEXT), 1)[:, 0]),
        lambda: entropy(X, MATRIX, NEXT),
    ),
    "cross_entropy, packed or not": (lambda: entropy(X, Q.pack(), NEXT), lambda: entropy(X, Q, NEXT)),
    "cross_entropy, mean of nothing": (
        lambda: entropy(X, Q, NEXT * 0 - 100, reduction="mean").isnan().float(),
        lambda: torch.tensor(1.0),
    ),
    "embedding, no ids": (lambda: embed(torch.empty(0, dtype=torch.int64), Q), lambda: torch.empty(0, K)),
    "attention, no queries": (lambda: attend(HEADS[:, :, :0], KEYS, KEYS), lambda: HEADS[:, :, :0]),
    "attention, no keys": (
        lambda: attend(HEADS, KEYS[:, :, :0], KEYS[:, :, :0], causal=False),
        lambda: torch.zeros_like(HEADS),
    ),
    "attention, a table without pages": (
        lambda: paged(TABLE[:, :0], torch.tensor([0, 0])),
        lambda: torch.zeros_like(HEADS),
    ),
    "attention, nonsense in the table where no key is": (
        lambda: paged(torch.tensor([[3, 1 << 40], [-5, -6]]), torch.tensor([8, 0])),
        lambda: torch.cat([attend(HEADS[:1], POOL[3:], POOL[3:]), torch.zeros_like(HEADS[1:])]),
    ),
    "attention, no sequences": (lambda: attend(HEADS[:0], KEYS[:0], KEYS[:0]), lambda: HEADS[:0]),
}


@pytest.mark.parametrize("name", GOOD_BUT_ODD)
def test_odd_input_gets_the_right_answer(name):
    ours, expected = GOOD_BUT_ODD[name]
    assert torch.allclose(ours(), expected(), rtol=1e-5, atol=1e-6)


def test_nan_in_gives_nan_out_and_only_there():
    x = X.clone()
    x[1, 3] = math.nan
    for y in (
        norm(x, W),
        entropy(x, MATRIX, NEXT),
        entropy(x, Q, NEXT, softcap=2.0),
        matmul(x, Q),
        matmul(x, Q, activations="int8"),
        gate(x, x),
    ):
        assert bool(y[1].isnan().any())
        assert bool(y[[0, 2]].isfinite().all())


def test_elements_past_the_reach_of_a_32_bit_index():
    """Two rows 2^31 elements apart, in a file of holes that costs no memory."""
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        count = 2**31 + 4 * K
        file.truncate(4 * count)
        memory = torch.from_file(file.name, shared=True, size=count)
        far = memory.as_strided((2, K), (2**31 + K, 1))
        far.copy_(X[:2])
        assert torch.equal(norm(far, W), norm(X[:2], W))
        assert torch.equal(matmul(far, Q), matmul(X[:2], Q))
        assert torch.equal(gate(far, far), gate(X[:2], X[:2]))


if __name__ == "__main__":
    for call, _, _ in BAD:
        kind, said = sentence(call)
        print(f"{kind.__name__}: {said}")
    print(f"{len(BAD)} bad inputs tried, each refused in words")
