"""QuantizedTensor, its layouts, rounding, and the importers against dequantisers written from the formats."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm.pages import HugePages
from fastllm.quant import (
    QuantizedTensor,
    cat_rows,
    from_awq,
    from_gptq,
    from_hqq,
    from_q4_0,
    from_q4_1,
    from_q8_0,
    pack_parts,
    quantize,
)
from fastllm.quant.tensor import store_integers

gguf = pytest.importorskip("gguf")

LAYOUT_SHAPES = [
    (1, 32, 32),
    (15, 64, 32),
    (16, 64, 64),
    (17, 96, 32),
    (33, 128, 128),
    (5, 7, 7),
    (18, 12, 12),
    (3, 1, 1),
]


def random_quantized(n, k, bits, group_size, zero=0, minimum=True, dtype=torch.float16, seed=0):
    """A QuantizedTensor and the integers it was made of."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=generator)
    groups = k // group_size
    scale = (torch.rand((n, groups), generator=generator) * 0.1 + 0.001).to(dtype)
    low = torch.randn((n, groups), generator=generator).to(dtype) if minimum else None
    tensor = QuantizedTensor.make(
        store_integers(q, bits), scale, low, zero=zero, shape=(n, k), bits=bits, group_size=group_size
    )
    return tensor, q


def by_the_formula(tensor, q):
    """float64, one column at a time, straight from the class's formula."""
    n, k = tensor.shape
    w = torch.empty((n, k), dtype=torch.float64)
    for column in range(k):
        group = column // tensor.group_size
        w[:, column] = (q[:, column].double() - tensor.zero) * tensor.scale[:, group].double()
        if tensor.minimum is not None:
            w[:, column] += tensor.minimum[:, group].double()
    return w


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k", "group_size"), LAYOUT_SHAPES)
def test_dequantize_and_layouts(n, k, group_size, bits):
    tensor, q = random_quantized(n, k, bits, group_size, zero=3)
    expected = by_the_formula(tensor, q)
    assert torch.equal(tensor.dequantize(torch.float64), expected)
    product = (q.float() - 3).view(n, -1, group_size) * tensor.scale.float().unsqueeze(-1)
    assert torch.equal(tensor.dequantize(), (product + tensor.minimum.float().unsqueeze(-1)).view(n, k))
    assert torch.equal(tensor.dequantize(torch.bfloat16), tensor.dequantize().bfloat16())
    packed = tensor.pack()
    assert packed.layout == "x16" and packed.pack() is packed and tensor.unpack() is tensor
    assert torch.equal(packed.dequantize(torch.float64), expected)
    back = packed.unpack()
    for name in ("data", "scale", "minimum"):
        assert torch.equal(getattr(back, name), getattr(tensor, name)), name
    options = {"zero": 3, "shape": (n, k), "bits": bits, "group_size": group_size, "layout": "x16"}
    QuantizedTensor.make(packed.data, packed.scale, packed.minimum, **options)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k", "group_size"), LAYOUT_SHAPES)
def test_x16_bytes_are_where_the_docstring_says(n, k, group_size, bits):
    tensor, q = random_quantized(n, k, bits, group_size, zero=5)
    packed = tensor.pack()
    blocks, padded_k, width = -(-n // 16), -(-k // 8) * 8, 8 if bits == 4 else 4
    full = torch.full((blocks * 16, padded_k), 5, dtype=torch.uint8)
    full[:n, :k] = q
    source, stored = full.tolist(), packed.data.tolist()
    assert packed.data.shape == (blocks, padded_k // width, 64) and packed.data.data_ptr() % 64 == 0
    for block in range(blocks):
        for line in range(padded_k // width):
            for row in range(16):
                columns = source[block * 16 + row][line * width : (line + 1) * width]
                for j in range(4):
                    expected = columns[j] if bits == 8 else columns[j] | columns[4 + j] << 4
                    assert stored[block][line][row * 4 + j] == expected, (block, line, row, j)
    for name in ("scale", "minimum"):
        values, blocked = getattr(tensor, name), getattr(packed, name)
        assert blocked.shape == (blocks, k // group_size, 16)
        for row in range(blocks * 16):
            expected = values[row] if row < n else torch.zeros_like(values[0])
            assert torch.equal(blocked[row // 16, :, row % 16], expected)


def test_pack_crosses_its_row_chunks():
    tensor, _ = random_quantized(2 * 1024 + 21, 64, 4, 32)
    assert torch.equal(tensor.pack().unpack().data, tensor.data)
    assert torch.equal(tensor.pack().data[64:128], tensor.slice_rows(1024, 2048).pack().data)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("with_minimum", [False, True])
def test_parts_pack_to_what_the_whole_packs_to(bits, with_minimum):
    whole, _ = random_quantized(80 + 21, 40, bits, 40)
    whole = whole if with_minimum else replace(whole, minimum=None)
    parts = [whole.slice_rows(*at) for at in ((0, 16), (16, 80), (80, 101))]
    for memory in (None, HugePages()):
        packed, expected = pack_parts(iter(parts), 101, memory), whole.pack()
        for name in ("data", "scale", "minimum"):
            mine, its = getattr(packed, name), getattr(expected, name)
            assert mine is its is None or torch.equal(mine, its), name
        assert packed.shape == whole.shape and packed.layout == "x16"
    for wrong, n, sentence in (
        ([], 101, "pack_parts: parts is 'none'"),
        (parts[:2], 101, "rows of the parts is 80, expected 101 in all"),
        (parts, 100, "rows of the parts is 101, expected 100 in all"),
        ([whole.slice_rows(0, 20), whole.slice_rows(20, 101)], 101, "each part but the last fills blocks of 16"),
        ([parts[0], replace(parts[1], zero=1), parts[2]], 101, "an element of parts is .*, expected one like"),
        ([parts[0].pack(), *parts[1:]], 101, "in layout 'rows'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            pack_parts(wrong, n)


@pytest.mark.parametrize("layout", ["rows", "x16"])
def test_slice_rows(layout):
    tensor, _ = random_quantized(40, 64, 4, 32)
    dense = tensor.dequantize()
    tensor = tensor.pack() if layout == "x16" else tensor
    part = tensor.slice_rows(16, 40)
    assert part.shape == (24, 64) and torch.equal(part.dequantize(), dense[16:40])
    assert part.data.untyped_storage().data_ptr() == tensor.data.untyped_storage().data_ptr()
    for start, stop in ((3, 3), (0, 41), (-1, 4)):
        with pytest.raises(ValueError, match="slice_rows: range"):
            tensor.slice_rows(start, stop)
    if layout == "x16":
        with pytest.raises(ValueError, match="unpack"):
            tensor.slice_rows(0, 17)


@pytest.mark.parametrize("layout", ["rows", "x16"])
def test_cat_rows(layout):
    a, _ = random_quantized(32, 128, 4, 32, seed=1)
    b, _ = random_quantized(16, 128, 4, 64, minimum=False, seed=2)
    c, _ = random_quantized(7, 128, 4, 32, dtype=torch.float32, seed=3)
    parts = [tensor.pack() if layout == "x16" else tensor for tensor in (a, b, c)]
    joined = cat_rows(parts)
    assert joined.shape == (55, 128) and joined.group_size == 32 and joined.scale.dtype == torch.float32
    assert torch.equal(joined.dequantize(), torch.cat([tensor.dequantize() for tensor in (a, b, c)]))


def test_cat_rows_moves_zero_into_the_minimum_only_where_it_is_exact():
    a, _ = random_quantized(4, 64, 4, 32, zero=0, seed=1)
    b, _ = random_quantized(4, 64, 4, 32, zero=8, minimum=False, seed=2)
    joined = cat_rows([a, b])
    assert torch.equal(joined.dequantize(), torch.cat([a.dequantize(), b.dequantize()]))
    same = cat_rows([b, b])
    assert same.zero == 8 and same.minimum is None and same.scale.dtype == torch.float16
    for refused in (random_quantized(4, 64, 4, 32, zero=8)[0], replace(b, scale=b.scale.float())):
        with pytest.raises(ValueError, match="cat_rows: zero"):
            cat_rows([a, refused])


def test_cat_rows_refusals():
    a, _ = random_quantized(17, 64, 4, 32)
    for other in (random_quantized(4, 32, 4, 32)[0], random_quantized(4, 64, 8, 32)[0], a.pack()):
        with pytest.raises(ValueError, match="cat_rows: "):
            cat_rows([a, other])
    with pytest.raises(ValueError, match="multiples of 16"):
        cat_rows([a.pack(), a.pack()])
    with pytest.raises(ValueError, match="at least one"):
        cat_rows([])
    with pytest.raises(TypeError, match="QuantizedTensor"):
        cat_rows([torch.zeros(1)])
    whole = random_quantized(1, 96, 4, 96)[0]
    uneven = replace(whole, group_size=64)
    with pytest.raises(ValueError, match="cat_rows: group_size"):
        cat_rows([whole, uneven])


def test_make_refuses_in_words():
    good, _ = random_quantized(4, 64, 4, 32)
    arguments = {"data": good.data, "scale": good.scale, "minimum": good.minimum}
    arguments |= {"zero": 0, "shape": (4, 64), "bits": 4, "group_size": 32}
    QuantizedTensor.make(**arguments)
    wrong = [
        (ValueError, "bits", {"bits": 5}),
        (ValueError, "layout", {"layout": "tiles"}),
        (ValueError, "shape", {"shape": (0, 64)}),
        (ValueError, "group_size", {"group_size": 48}),
        (ValueError, "zero", {"zero": 16}),
        (TypeError, "data", {"data": [1]}),
        (TypeError, "data has dtype", {"data": good.data.int()}),
        (ValueError, "data has shape", {"data": good.data[:3]}),
        (ValueError, "stride of data", {"data": good.data.t().contiguous().t()}),
        (TypeError, "scale has dtype", {"scale": good.scale.double()}),
        (ValueError, "scale has shape", {"scale": good.scale[:, :1]}),
        (TypeError, "minimum has dtype", {"minimum": good.minimum.float()}),
        (ValueError, "scale is 'partly inf", {"scale": good.scale * torch.inf}),
    ]
    for error, text, change in wrong:
        with pytest.raises(error, match=f"QuantizedTensor: {text}"):
            QuantizedTensor.make(**{**arguments, **change})
    packed = good.pack()
    shifted = torch.zeros(packed.data.numel() + 4, dtype=torch.uint8)[4:].view(packed.data.shape)
    with pytest.raises(ValueError, match="0 modulo 64"):
        QuantizedTensor.make(shifted, packed.scale, zero=0, shape=(4, 64), bits=4, group_size=32, layout="x16")
    with pytest.raises(TypeError, match="dequantize: dtype"):
        good.dequantize(torch.int8)
    assert "(4, 64)" in repr(good) and good.nbytes == 4 * 32 + 2 * 4 * 2 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1, None])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, None), (4, True), (8, None), (8, False)])
def test_quantize_is_near_half_a_step(bits, symmetric, group_size, dtype):
    weight = torch.randn((19, 256), generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor = quantize(weight, bits, group_size, symmetric=symmetric)
    is_symmetric = bits == 8 if symmetric is None else symmetric
    assert (tensor.minimum is None) == is_symmetric and tensor.zero == ((1 << bits) // 2 if is_symmetric else 0)
    assert tensor.group_size == (group_size if group_size and group_size > 0 else 256)
    step = tensor.scale.double().repeat_interleave(tensor.group_size, dim=1)
    # 1/2 step from rounding, 1/8 from storing scale and minimum in fp16, and fp32's own rounding
    error = (tensor.dequantize(torch.float64) - weight.double()).abs()
    assert bool((error <= step * 0.6251).all())


def test_integers_are_the_nearest_for_the_stored_scale_and_minimum():
    weight = torch.randn((8, 128), generator=torch.Generator().manual_seed(1))
    for bits, symmetric in ((4, False), (4, True), (8, True), (8, False)):
        tensor = quantize(weight, bits, 32, symmetric=symmetric)
        chosen = (tensor.dequantize(torch.float64) - weight).abs()
        for q in range(1 << bits):
            data = store_integers(torch.full((8, 128), q, dtype=torch.uint8), bits)
            other = (replace(tensor, data=data).dequantize(torch.float64) - weight).abs()
            assert bool((chosen <= other + 1e-6).all()), (bits, q)


def test_quantize_keeps_fp32_where_fp16_would_lose():
    generator = torch.Generator().manual_seed(2)
    narrow = 1000 + torch.rand((4, 64), generator=generator) * 0.1
    normal = torch.randn((4, 64), generator=generator)
    for weight in (narrow, normal * 1e-7, normal * 1e37):
        tensor = quantize(weight, 4, 64)
        assert tensor.scale.dtype == torch.float32
        step = (weight.amax(dim=1).double() - weight.amin(dim=1).double()) / 15
        error = (tensor.dequantize(torch.float64) - weight.double()).abs().amax(dim=1)
        assert bool((error <= step * 0.51).all())
    assert quantize(normal * 1e-7, 8, 64).scale.dtype == torch.float32
    assert quantize(normal, 4, 64).scale.dtype == torch.float16


def test_quantize_of_constants_and_zeros():
    weight = torch.cat([torch.zeros(2, 64), torch.full((2, 64), -0.375), torch.full((2, 64), 3.0)])
    for bits in (4, 8):
        for symmetric in (False, True):
            restored = quantize(weight, bits, 32, symmetric=symmetric).dequantize()
            assert torch.allclose(restored, weight, rtol=2**-10, atol=0)


def test_search_is_never_worse_and_importance_steers_it():
    weight = torch.randn((16, 128), generator=torch.Generator().manual_seed(3))
    weight[:, ::41] *= 4
    importance = torch.zeros(128)
    importance[3] = 1.0
    for symmetric in (False, True):
        nearest = quantize(weight, 4, 64, symmetric=symmetric).dequantize() - weight
        found = quantize(weight, 4, 64, symmetric=symmetric, method="search").dequantize() - weight
        assert float(found.square().sum()) < float(nearest.square().sum())
        steered = quantize(weight, 4, 64, symmetric=symmetric, method="search", importance=importance)
        assert float((steered.dequantize() - weight)[:, 3].square().sum()) < float(found[:, 3].square().sum())


def test_quantize_refuses_in_words():
    weight = torch.randn(4, 96)
    wrong = [
        (TypeError, "weight is a list", ([1.0],), {}),
        (TypeError, "weight has dtype", (weight.double(),), {}),
        (ValueError, "weight has shape", (weight[0],), {}),
        (ValueError, "weight has shape", (weight[:0],), {}),
        (ValueError, "bits is 3", (weight, 3), {}),
        (ValueError, "group_size is 64", (weight, 4, 64), {}),
        (ValueError, "group_size is 48", (weight, 4, 48), {}),
        (ValueError, "method", (weight, 4, 32), {"method": "best"}),
        (ValueError, "weight is 'partly inf", (weight / 0, 4, 32), {}),
        (ValueError, "weight is 'partly inf", (torch.where(weight > 1, torch.nan, weight), 4, 32), {}),
        (ValueError, "importance", (weight, 4, 32), {"importance": torch.ones(96)}),
        (ValueError, "importance has shape", (weight, 4, 32), {"importance": torch.ones(3), "method": "search"}),
        (ValueError, "importance", (weight, 4, 32), {"importance": -torch.ones(96), "method": "search"}),
    ]
    for error, text, arguments, options in wrong:
        with pytest.raises(error, match=f"quantize: {text}"):
            quantize(*arguments, **options)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([32, 64, 128]),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    magnitude=st.floats(-30, 30),
    seed=st.integers(0, 1 << 20),
)
def test_any_quantized_weight_survives_packing(n, groups, group_size, bits, symmetric, magnitude, seed):
    weight = torch.randn((n, groups * group_size), generator=torch.Generator().manual_seed(seed)) * 10.0**magnitude
    tensor = quantize(weight, bits, group_size, symmetric=symmetric)
    assert torch.equal(tensor.pack().dequantize(), tensor.dequantize())
    assert torch.equal(tensor.pack().unpack().data, tensor.data)
    relative = (tensor.dequantize(torch.float64) - weight.double()).abs().amax() / weight.double().abs().amax()
    assert float(relative) <= 0.6251 * 2 / ((1 << bits) - 2)


@pytest.mark.parametrize(
    ("name", "convert", "zero", "bits"),
    [("Q4_0", from_q4_0, 8, 4), ("Q4_1", from_q4_1, 0, 4), ("Q8_0", from_q8_0, 128, 8)],
)
def test_ggml_blocks_equal_gguf_dequantize(name, convert, zero, bits):
    dense = np.random.default_rng(0).standard_normal((23, 192)).astype(np.float32)
    raw = gguf.quants.quantize(dense, gguf.GGMLQuantizationType[name])
    tensor = convert(torch.from_numpy(raw))
    expected = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name]))
    assert (tensor.shape, tensor.bits, tensor.zero, tensor.group_size) == ((23, 192), bits, zero, 32)
    assert tensor.scale.dtype == torch.float16
    assert torch.equal(tensor.dequantize(), expected) and torch.equal(tensor.pack().dequantize(), expected)
    strided = torch.from_numpy(np.concatenate([raw, raw], axis=1))[:, : raw.shape[1]]
    assert torch.equal(convert(strided).data, tensor.data)
    with pytest.raises(ValueError, match="blocks has shape"):
        convert(torch.from_numpy(raw)[:, :-1])
    with pytest.raises(TypeError, match="blocks has dtype"):
        convert(torch.from_numpy(raw).int())
    hostile = raw.copy()
    hostile[0, :2] = 0xFF  # an fp16 nan
    with pytest.raises(ValueError, match="scale is 'partly inf"):
        convert(torch.from_numpy(hostile))


def pack_words(values, bits, order=None):
    """(R, C) integers -> (R, C * bits / 32) int32, field i of a word holding column order[i]."""
    per_word = 32 // bits
    words = np.zeros((values.shape[0], values.shape[1] // per_word), dtype=np.uint32)
    for field, column in enumerate(order or range(per_word)):
        words |= values[:, column::per_word].astype(np.uint32) << np.uint32(bits * field)
    return torch.from_numpy(words.view(np.int32))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_offset", [0, 1])
@pytest.mark.parametrize("shared", [False, True])
def test_gptq(bits, zero_offset, shared):
    rng = np.random.default_rng(1)
    n, k, group_size = 24, 128, 32
    q = rng.integers(0, 1 << bits, (k, n))
    stored = np.full((k // group_size, n), 7) if shared else rng.integers(0, (1 << bits) - 1, (k // group_size, n))
    scales = rng.random((k // group_size, n)).astype(np.float16)
    group = np.arange(k) // group_size
    expected = (q - (stored[group] + zero_offset)) * scales[group].astype(np.float64)
    arguments = (pack_words(q.T, bits).t().contiguous(), pack_words(stored, bits), torch.from_numpy(scales))
    tensor = from_gptq(*arguments, torch.from_numpy(group.astype(np.int32)), bits=bits, zero_offset=zero_offset)
    assert torch.equal(tensor.dequantize().double(), torch.from_numpy(expected.T))
    assert (tensor.minimum is None, tensor.zero) == (shared, 7 + zero_offset if shared else 0)
    assert tensor.scale.dtype == (torch.float16 if shared else torch.float32)
    with pytest.raises(ValueError, match="g_idx"):
        from_gptq(*arguments, torch.from_numpy(np.roll(group, 1)), bits=bits)
    with pytest.raises(ValueError, match="qzeros has shape"):
        from_gptq(arguments[0], arguments[1][:2], arguments[2], bits=bits)
    with pytest.raises(ValueError, match="zero_offset"):
        from_gptq(*arguments, bits=bits, zero_offset=2)
    with pytest.raises(TypeError, match="scales has dtype"):
        from_gptq(*arguments[:2], arguments[2].double(), bits=bits)


def test_gptq_zero_wraps_at_its_field():
    qweight, scales = pack_words(np.full((8, 32), 5), 4).t().contiguous(), torch.ones((1, 8), dtype=torch.float16)
    tensor = from_gptq(qweight, pack_words(np.full((1, 8), 15), 4), scales)
    assert tensor.zero == 0 and bool((tensor.dequantize() == 5).all())


def test_awq():
    rng = np.random.default_rng(2)
    n, k, group_size = 40, 256, 64
    q, zeros = rng.integers(0, 16, (k, n)), rng.integers(0, 16, (k // group_size, n))
    scales = rng.random((k // group_size, n)).astype(np.float16)
    group = np.arange(k) // group_size
    expected = (q - zeros[group]) * scales[group].astype(np.float64)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensor = from_awq(pack_words(q, 4, order), pack_words(zeros, 4, order), torch.from_numpy(scales))
    assert tensor.shape == (n, k) and torch.equal(tensor.dequantize().double(), torch.from_numpy(expected.T))
    with pytest.raises(ValueError, match="scales has shape"):
        from_awq(pack_words(q, 4, order), pack_words(zeros, 4, order), torch.from_numpy(scales[:, :8]))


@pytest.mark.parametrize("bits", [4, 8])
def test_hqq(bits):
    rng = np.random.default_rng(3)
    n, k, group_size = 12, 128, 64
    q = rng.integers(0, 1 << bits, (n * k // group_size, group_size)).astype(np.uint8)
    scale, zero = (rng.random((len(q), 1)).astype(np.float32) for _ in range(2))
    zero *= (1 << bits) - 1
    expected = ((q - zero.astype(np.float64)) * scale.astype(np.float64)).reshape(n, k)
    half = len(q) // 2
    stored = q if bits == 8 else (q[:half] << 4) | q[half:]
    arguments = (torch.from_numpy(stored), torch.from_numpy(scale), torch.from_numpy(zero))
    tensor = from_hqq(*arguments, (n, k), bits=bits, group_size=group_size)
    assert tensor.minimum.dtype == torch.float32
    # the product zero * scale, q * scale and their sum round once each
    bound = 3 * 2.0**-24 * float((zero.astype(np.float64) * scale).max() + (q * scale.astype(np.float64)).max())
    assert float((tensor.dequantize().double() - torch.from_numpy(expected)).abs().max()) <= bound
    with pytest.raises(ValueError, match="w_q has shape"):
        from_hqq(*arguments, (n + 1, k), bits=bits)
    with pytest.raises(ValueError, match="group_size"):
        from_hqq(*arguments, (n, k), bits=bits, group_size=100)
