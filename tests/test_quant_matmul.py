"""What the cases do not say of quant_matmul on the CPU: which tokens a token's bits depend on, and what numbers too large for a
kernel's shortcuts become."""

from __future__ import annotations

import pytest
import torch

import fastllm
from fastllm.backends import isa_names, use_backend, use_isa
from fastllm.quant import quantize

ROWS, COLUMNS = 80, 736  # five blocks of rows, of which tiles may take two; more than a segment of columns


def _weight(bits: int, symmetric: bool):
    generator = torch.Generator().manual_seed(0)
    return quantize(torch.randn(ROWS, COLUMNS, generator=generator), bits, 32, symmetric=symmetric)


def _tokens(count: int, dtype: torch.dtype):
    return torch.randn(count, COLUMNS, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("isa", isa_names())
@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_tokens_bits_do_not_depend_on_the_other_tokens(bits, dtype, activations, isa):
    weight, x = _weight(bits, symmetric=bits == 8), _tokens(27, dtype)
    with use_isa(isa), use_backend("cpu"):
        alone = torch.cat([fastllm.quant_matmul(row[None], weight, activations=activations) for row in x])
        for count in range(2, len(x) + 1):  # every size of tile, and of what is left over
            assert fastllm.quant_matmul(x[:count], weight, activations=activations).equal(alone[:count]), count


@pytest.mark.parametrize("bits", [4, 8])
def test_a_tokens_bits_do_not_depend_on_how_they_are_divided(bits):
    """Among threads, and into passes."""
    weight, x = _weight(bits, symmetric=True), _tokens(1100, torch.float32)
    before = torch.get_num_threads()
    with use_backend("cpu"):
        try:
            torch.set_num_threads(1)
            alone = torch.cat([fastllm.quant_matmul(part, weight, activations="int8") for part in x.split(60)])
            for threads in (1, 2, 3, 16):
                torch.set_num_threads(threads)
                for count in (127, 128, 131, 200, 256, 257, 513, 1100):
                    y = fastllm.quant_matmul(x[:count], weight, activations="int8")
                    assert y.equal(alone[:count]), (threads, count)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("isa", isa_names())
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("count", [3, 20])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [1e30, -3e38, float("inf"), float("nan")])
def test_a_large_activation_is_multiplied_as_any_other(value, bits, count, symmetric, isa):
    weight, x = _weight(bits, symmetric), _tokens(count, torch.bfloat16)
    usual = x.clone()
    x[1, 5] = value
    with use_isa(isa), use_backend("cpu"):
        y, before = fastllm.quant_matmul(x, weight), fastllm.quant_matmul(usual, weight)
    true = x[1].double() @ weight.dequantize(torch.float64).T
    others = torch.arange(count) != 1
    assert y[others].equal(before[others])
    assert y[1].isnan().equal(true.isnan())
    same = true.abs() > 3.4e38  # infinite, or too large for bf16
    assert y[1][same].double().equal(true[same].sign() * float("inf"))
    small = true.isfinite() & ~same
    if small.any():
        torch.testing.assert_close(y[1][small].double(), true[small], rtol=2**-8, atol=abs(value) * 2**-20)
