"""Every op's autograd formula, held to the tolerance rule with factor 3. No op is named here.

g = the op's gradients, r = autograd through the reference in float64 on the same inputs, p = autograd through PyTorch's own
way in the working dtype: worst |g - r| <= 3 max|p - r| + u max|r|, and the same for the mean square.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastllm
from fastllm.measure.check import check
from fastllm.measure.verify import all_cases, case_inputs, clone, results

LARGE = 256 << 10  # bytes of a case's inputs
FACTOR = 3.0  # the rule's factor for a backward


def tensors(inputs):
    return {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}


def refuses(spec, inputs, name):
    """Whether the op says in words that it has no gradient to this argument."""
    inputs = {k: clone(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    inputs[name].requires_grad_()
    try:
        sum(y.sum() for y in results(spec.call(**inputs))).backward()
    except NotImplementedError as error:
        if ": no gradient" not in str(error):
            raise
        return True
    return False


def _collect():
    params = []
    for spec in all_cases().values():
        differentiable = {}
        for case in spec.cases:
            if case.bench:
                continue
            inputs = case_inputs(spec, case)
            if sum(t.numel() * t.element_size() for t in tensors(inputs).values()) > LARGE:
                continue
            given = tuple(name for name, value in inputs.items() if isinstance(value, Tensor))
            if given not in differentiable:  # asked once for the arguments that are there: the answer must not depend on shapes
                differentiable[given] = [name for name in tensors(inputs) if not refuses(spec, inputs, name)]
            wanted = differentiable[given]
            if wanted:
                params.append(pytest.param(spec, case, wanted, id=f"{spec.op}-{case.name}-{case.dtype}"))
    return params


CASES = _collect()


def gradients(function, inputs, wanted, cotangents=None):
    """Of every result with its own cotangent, to every wanted argument; the cotangents are the same for all dtypes."""
    inputs = {k: clone(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    for name in wanted:
        inputs[name].requires_grad_()
    out = [y for y in results(function(**inputs)) if y.requires_grad]
    seeds = [c.to(y.dtype) for c, y in zip(cotangents, out, strict=True)]
    torch.autograd.backward(out, seeds)
    return {name: inputs[name].grad for name in wanted}


def seeds(spec, inputs, dtype):
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        shapes = [y.shape for y in results(spec.reference(**inputs))]
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


@pytest.mark.parametrize(("spec", "case", "wanted"), CASES)
def test_gradient_is_within_the_rule(spec, case, wanted):
    inputs = case_inputs(spec, case)
    cotangents = seeds(spec, inputs, case.dtype)
    ours = gradients(spec.call, inputs, wanted, cotangents)
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    exact = gradients(spec.reference, wide, wanted, [c.double() for c in cotangents])
    theirs = gradients(spec.torch, inputs, wanted, cotangents)
    for name in wanted:
        assert ours[name] is not None, f"no gradient to {name}"
        assert ours[name].dtype == inputs[name].dtype
        verdict = check(ours[name], exact[name], theirs[name], factor=FACTOR)
        assert verdict.ok, f"{name}: {verdict.why}"


FP32 = [p for p in CASES if p.id.endswith("float32")]


@pytest.mark.parametrize(("spec", "case", "wanted"), FP32)
def test_one_argument_at_a_time(spec, case, wanted):
    """A gradient must not depend on which others are asked for."""
    inputs = case_inputs(spec, case)
    cotangents = seeds(spec, inputs, case.dtype)
    together = gradients(spec.call, inputs, wanted, cotangents)
    for name in wanted:
        inner = {k: clone(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        inner[name].requires_grad_()
        out = results(spec.call(**inner))
        torch.autograd.backward([y for y in out if y.requires_grad], [c for c, y in zip(cotangents, out) if y.requires_grad])
        # An output that does not depend on the argument, and one whose cotangent is left out, contribute nothing.
        expected = together[name]
        assert inner[name].grad.equal(expected), name


@pytest.mark.parametrize(("spec", "case", "wanted"), FP32)
def test_one_result_at_a_time(spec, case, wanted):
    """Where a call has several results, a loss may use one alone: the gradients then add up to the whole."""
    inputs = case_inputs(spec, case)
    cotangents = seeds(spec, inputs, case.dtype)
    if len(cotangents) == 1:
        pytest.skip("one result")
    totals = {}
    for used in range(len(cotangents)):
        inner = {k: clone(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        leaves = [inner[name].requires_grad_() for name in wanted]
        out = results(spec.call(**inner))
        found = torch.autograd.grad(out[used], leaves, cotangents[used], allow_unused=True)
        for name, grad in zip(wanted, found):
            if grad is not None:
                totals[name] = totals.get(name, 0) + grad.double()
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    exact = gradients(spec.reference, wide, wanted, [c.double() for c in cotangents])
    theirs = gradients(spec.torch, inputs, wanted, cotangents)
    for name in wanted:
        verdict = check(totals[name].float(), exact[name], theirs[name], factor=FACTOR)
        assert verdict.ok, f"{name}: {verdict.why}"


@pytest.mark.parametrize(("spec", "case", "wanted"), FP32)
def test_the_forced_reference_differentiates_too(spec, case, wanted):
    """PyTorch sees through the forced reference: its gradients are autograd's own, to the bit."""
    inputs = case_inputs(spec, case)
    cotangents = seeds(spec, inputs, case.dtype)
    with fastllm.use_backend("reference"):
        plain = gradients(spec.call, inputs, wanted, cotangents)
    expected = gradients(spec.reference, inputs, wanted, cotangents)
    for name in wanted:
        assert plain[name].allclose(expected[name], rtol=0, atol=0, equal_nan=True), name


WRONG = {
    "twice the gradient": lambda grad: grad * 2,
    "the opposite gradient": lambda grad: -grad,
    "a gradient of zero": torch.zeros_like,
    "the last lane is dropped": lambda grad: torch.cat((grad[..., :-1], torch.zeros_like(grad[..., -1:])), -1),
    "rows in the wrong order": lambda grad: grad.flip(0) if grad.dim() == 1 else grad.flip(-2),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("op", sorted({p.values[0].op for p in CASES}))
def test_the_rule_catches_a_wrong_gradient(op, wrong):
    """The test of the test."""
    for spec, case, wanted in (p.values for p in FP32 if p.values[0].op == op):
        inputs = case_inputs(spec, case)
        cotangents = seeds(spec, inputs, case.dtype)
        wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
        exact = gradients(spec.reference, wide, wanted, [c.double() for c in cotangents])
        theirs = gradients(spec.torch, inputs, wanted, cotangents)
        if not all(check(WRONG[wrong](exact[n]).float(), exact[n], theirs[n], factor=FACTOR).ok for n in wanted):
            return
    pytest.fail(f"no case of {op} notices {wrong}")
