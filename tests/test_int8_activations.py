"""int8 results are to the bit those of a float result rounded afterwards, and quant_matmul multiplies the same integers.

The cases' values are held to the tolerance rule in test_ops.py; here are integers, scales and sums, on every backend that runs
(test_cuda.py and test_triton.py ask for theirs where GPUs are simulated).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fastllm
from fastllm import Int8Activations, backends
from fastllm.measure.verify import case_inputs, device_of, forced, refusal, runs_here, select_cases, to_device, too_slow
from fastllm.ops._explain import ops_reached
from fastllm.quant import activation_group, quantize

WRITERS = ("rms_norm_int8", "gated_activation_int8")


def places(spec, case):
    """(backend, rung) that serve the case here, the reference too."""
    for name in dict.fromkeys(b.name for op, _ in ops_reached(spec.call, (), case_inputs(spec, case)) for b in op.backends):
        for isa in backends.isa_names() if name == "cpu" else (None,):
            if (name == "reference" or runs_here(name)) and not too_slow(case, isa, name):
                yield name, isa


def on_every_place(op):
    return [
        pytest.param(spec, case, name, isa, id=f"{op}-{case.name}-{case.dtype}-{name}-{isa}")
        for spec, case in select_cases("test", [op])
        if not case.bench
        for name, isa in places(spec, case)
    ]


def first(y):
    return y[0] if isinstance(y, tuple) else y


def same(a, b):
    """To the bit, but that a NaN equals a NaN."""
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=-1.0), b.nan_to_num(nan=-1.0))


def sums_of(y: Int8Activations):
    """Of each group's integers, exactly."""
    k, g = y.shape[-1], y.group_size
    padded = torch.nn.functional.pad(y.data.long(), (0, -k % g))
    return padded.unflatten(-1, (-(-k // g), g)).sum(-1)


def differs(spec, inputs):
    """How what the op writes in int8 differs from its float result rounded afterwards, in words; "" if in nothing."""
    with torch.no_grad():
        y = spec.call(**inputs)
        plain = spec.call(**{name: value for name, value in inputs.items() if name != "int8_group"})
    rounded, expected = first(y), Int8Activations.of(first(plain), inputs["int8_group"])
    alike = {
        "dtype, group or shape": repr(rounded) == repr(expected),
        "integers": rounded.data.equal(expected.data),
        "scales or sums": same(rounded.groups, expected.groups),
        "sums of its own integers": rounded.groups[..., 1].equal(sums_of(rounded).float()),
        "h": not isinstance(plain, tuple) or same(y[1], plain[1]),
    }
    return ", ".join(what for what, is_equal in alike.items() if not is_equal)


@pytest.mark.parametrize(("spec", "case", "backend", "isa"), [p for op in WRITERS for p in on_every_place(op)])
def test_it_is_the_float_result_rounded(spec, case, backend, isa):
    inputs = to_device(case_inputs(spec, case), device_of(backend))
    with forced(backend, isa):
        why = refusal(spec, inputs, backend)
        if why is not None:
            pytest.skip(why)
        assert not differs(spec, inputs)


BITS = [(bits, group, k) for bits in (4, 8) for group, k in ((32, 544), (64, 192), (128, 640), (-1, 131), (-1, 1031))]


@pytest.mark.parametrize("isa", backends.isa_names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "group", "k"), BITS)
def test_products_have_the_same_bits_on_the_cpu(bits, group, k, dtype, isa):
    """Whether quant_matmul rounds, or the norm or the gate has."""
    g = torch.Generator().manual_seed(7)
    w = quantize(torch.randn(35, k, generator=g), bits, group).pack()
    act = activation_group(w.group_size)
    x, residual = (torch.randn(2, 5, k, generator=g).to(dtype) for _ in range(2))
    x[..., : k // 3] *= 100.0
    x[0, 1] = 0.0
    bias, weight = torch.randn(35, generator=g).to(dtype), torch.randn(k, generator=g).to(dtype)
    gate_up = torch.randn(3, 2 * k, generator=g).to(dtype)
    with forced("cpu", isa):
        y, h = fastllm.rms_norm(x, weight, residual=residual, int8_group=act)
        plain, sums = fastllm.rms_norm(x, weight, residual=residual)
        assert h.equal(sums)
        expected = fastllm.quant_matmul(plain, w, bias, activations="int8")
        assert fastllm.quant_matmul(y, w, bias).equal(expected)
        for row in range(5):  # alone
            alone = fastllm.rms_norm(x[1, row], weight, residual=residual[1, row], int8_group=act)[0]
            assert fastllm.quant_matmul(alone, w, bias, activations="float").equal(expected[1, row])
        gated = fastllm.gated_activation(gate_up, int8_group=act)
        expected = fastllm.quant_matmul(fastllm.gated_activation(gate_up), w, activations="int8")
        assert fastllm.quant_matmul(gated, w).equal(expected)


@pytest.mark.parametrize("isa", backends.isa_names())
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_poisons_its_group_and_its_row_of_the_product(bad, isa):
    x = torch.randn(3, 96)
    x[1, 40] = bad
    w = quantize(torch.randn(20, 96), 4, 32).pack()
    for backend in ("cpu", "reference"):
        with forced(backend, isa):
            gated = fastllm.gated_activation(x, torch.ones(3, 96), int8_group=32)
            normed = fastllm.rms_norm(x, None, int8_group=32)
            product = fastllm.quant_matmul(gated, w)
        assert gated.groups[..., 0].isnan().tolist() == [[False] * 3, [False, True, False], [False] * 3]
        assert not gated.data[1, 32:64].any()
        assert gated.groups[1, 1, 1] == 0
        assert product.isnan().all(-1).tolist() == [False, True, False]
        assert product.isfinite().all(-1).tolist() == [True, False, True]
        assert normed.groups[..., 0].isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_gradient_is_refused_in_words_by_the_reference_too(backend):
    """PyTorch would differentiate the scales and take the integers for constants."""
    x, w = torch.randn(3, 64, requires_grad=True), quantize(torch.randn(20, 64), 4, 32).pack()
    with fastllm.use_backend(backend):
        for y in (fastllm.rms_norm(x, None, int8_group=32), fastllm.gated_activation(x, x, int8_group=32)):
            for result in (y.dequantize(), fastllm.quant_matmul(y, w)):
                with pytest.raises(NotImplementedError, match=r"_int8: no gradient, because integers have none; call "):
                    result.sum().backward()


def test_sums_that_are_nobodys_do_no_harm():
    """The registered op takes any groups: what comes of them is nobody's concern, but it comes."""
    y = Int8Activations.of(torch.randn(2, 64), 32)
    w = quantize(torch.randn(20, 64), 4, 32).pack()
    for sums in (float("nan"), float("inf"), -3e38, 1e20):
        wrong = replace(y, groups=torch.stack((y.groups[..., 0], torch.full((2, 2), sums)), -1))
        assert fastllm.quant_matmul(wrong, w).shape == (2, 20)


def test_what_it_is_and_what_it_stands_for():
    x = torch.randn(2, 3, 100, generator=torch.Generator().manual_seed(1)).bfloat16()
    y = Int8Activations.of(x, 64)
    assert (y.shape, y.groups.shape, y.nbytes) == (x.shape, (2, 3, 2, 2), 600 + 96)
    assert repr(y) == "Int8Activations((2, 3, 100), group_size=64, of torch.bfloat16)"
    assert y.dequantize().dtype == torch.bfloat16
    assert y.dequantize(torch.float64).dtype == torch.float64
    step = x.float()[..., :64].abs().amax(-1, keepdim=True) / 127
    # x * (127 / amax) is up to 127, and has been rounded twice where it is rounded to an integer.
    slack = 1 + 2 * 127 * torch.finfo(torch.float32).eps
    assert bool(((y.dequantize(torch.float32) - x.float())[..., :64].abs() <= step / 2 * slack).all())


@pytest.mark.parametrize("isa", backends.isa_names())
@pytest.mark.parametrize("scale", [1e-25, 1e36])
def test_products_with_one_scale_a_row_stay_in_range(isa, scale):
    """Where groups' sums are scaled only at the end: neither infinite nor lost before."""
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(48, 4096, generator=g) * 1e-3, torch.randn(13, 4096, generator=g)
    q = quantize(weight, bits=8, group_size=-1)
    with backends.use_isa(isa):
        y = fastllm.ops.quant_matmul(x * scale, q, activations="int8").double() / scale
        wanted = fastllm.ops.quant_matmul(x, q, activations="int8").double()
    assert (y - wanted).abs().max() <= 1e-4 * wanted.abs().max()
