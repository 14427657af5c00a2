"""fastllm.explain says what a call would do, and does nothing of it."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastllm
from fastllm import backends
from fastllm.measure.verify import all_cases, copied, expected
from fastllm.ops._explain import ops_reached

needs_cpu_kernels = pytest.mark.skipif(backends.cpu_module() is None, reason="fastllm._cpu is not built")


@needs_cpu_kernels
def test_names_the_backend_its_rung_and_why_not_the_others(capsys):
    x, weight = torch.randn(4, 8), torch.ones(8)
    found = fastllm.explain("rms_norm", x, weight, eps=1e-5)
    assert found.backend == "cpu"
    text = capsys.readouterr().out
    assert text == f"{found}\n"
    assert text.startswith("rms_norm(float32[4x8], float32[8], eps=1e-05)\n")
    assert "-> cpu" in text
    assert f"rung {backends.cpu_module().kernels['rms_norm']()}" in text
    assert "reference  can serve the call, but cpu is preferred" in text


@needs_cpu_kernels
def test_follows_the_public_function_to_the_schema_that_it_picks():
    x = torch.randn(4, 8)
    found = fastllm.explain("rms_norm", x, None, residual=x)
    assert {choice.op for choice in found.choices} == {"rms_norm_residual"}
    assert "torch.ops.fastllm.rms_norm_residual" in str(found)


@needs_cpu_kernels
def test_says_why_a_backend_cannot_serve():
    found = fastllm.explain("rms_norm", torch.randn(8, 4).t(), None)
    assert found.backend == "reference"
    assert "it reads rows whose last dim has stride 1" in str(found)


@needs_cpu_kernels
def test_a_lower_rung_is_named():
    lowest = backends.isa_names()[0]
    with backends.use_isa(lowest):
        assert f"rung {lowest}" in str(fastllm.explain("rms_norm", torch.ones(2, 4), None))


def test_a_forced_backend_is_said_to_be_forced():
    x = torch.randn(4, 8)
    with fastllm.use_backend("reference"):
        found = fastllm.explain("rms_norm", x, None)
        assert found.backend == "reference"
        assert "cpu        reference is forced" in str(found)
    with fastllm.use_backend("triton"):
        found = fastllm.explain("rms_norm", x, None)
        assert found.backend is None
        assert "no backend can serve this call: it raises NotImplementedError" in str(found)


@needs_cpu_kernels
def test_work_that_another_kernel_does_is_said():
    found = fastllm.explain("cross_entropy", torch.randn(4, 8), torch.randn(5, 8), torch.zeros(4, dtype=torch.int64))
    assert found.backend == "cpu"
    assert "logits come from PyTorch's own product for a float weight" in str(found)


def test_shapes_without_data_are_enough():
    with FakeTensorMode():
        x = torch.empty(4, 8)
    assert fastllm.explain("rms_norm", x, None).backend == ("cpu" if backends.cpu_module() else "reference")
    assert fastllm.explain("rms_norm", torch.empty(4, 8, device="meta"), None).backend == "reference"


@pytest.mark.parametrize(
    ("arguments", "serves"),
    [
        ("rms_norm 4096x8192 8192 --device cuda", "triton"),
        ("rms_norm 4x64 none eps=1e-5", "cpu"),
        ("attention 1x32x1x128 1x8x4096x128 1x8x4096x128 window=1024 causal=true --device cuda", "triton"),
        ("quant_matmul 16x4096 int4:14336x4096:128 --device cuda", "triton"),
        ("quant_matmul 4096x4096 int4:14336x4096:128 --device cuda", "torch"),
        ("quant_matmul 4096x4096 int8:14336x4096:-1 activations=int8 --device cuda", "triton"),
    ],
)
def test_a_command_line_describes_a_call_by_shapes(arguments, serves, capsys):
    from fastllm.cli import main

    if serves == "cpu" and not backends.cpu_module():
        pytest.skip("the compiled module is not built")
    if serves != "cpu":
        pytest.importorskip("triton")
    assert main(["explain", *arguments.split()]) == 0
    assert f"-> {serves} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("quant_matmul 1x96 int4:32x96:64", "explain: group is 64, expected a divisor of 96"),
        ("quant_matmul 1x96 int4:96", "expected a weight as in"),
        ("rms_norm 4x64 32", "weight has shape"),
    ],
)
def test_a_wrong_description_is_a_sentence(arguments, text, capsys):
    from fastllm.cli import main

    assert main(["explain", *arguments.split()]) != 0
    assert text in capsys.readouterr().err


def test_an_unknown_op_lists_the_ops():
    with pytest.raises(ValueError, match=r"explain: op is 'layer_norm', expected one of .*rms_norm"):
        fastllm.explain("layer_norm", torch.ones(2))


def test_bad_arguments_get_the_ops_own_words():
    with pytest.raises(ValueError, match=r"rms_norm: weight has shape \(3,\), expected \(8,\)"):
        fastllm.explain("rms_norm", torch.randn(4, 8), torch.ones(3))


@pytest.mark.parametrize("spec", all_cases().values(), ids=all_cases())
def test_every_op_is_reached_and_nothing_is_written(spec):
    case = min(spec.cases, key=lambda c: (c.bytes == 0, c.flops))
    inputs = expected(spec, case).inputs
    before = copied(inputs)
    reached = ops_reached(spec.call, (), inputs)
    assert reached
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert value.equal(inputs[name]), f"{name} was written to"
