"""All ops x all backends x all rungs, driven by each op's cases.py. No op is named here."""

from __future__ import annotations

import pytest
import torch

from fastllm.backends import isa_names
from fastllm.measure.verify import all_cases, case_inputs, forced, results, run_case

SPECS = all_cases()


def cases_of(spec):
    """Without those that take the scalar rung or float64 minutes: ``verify`` and ``bench`` run these too."""
    return [case for case in spec.cases if case.flops <= 2e8]


EVERY = [
    pytest.param(spec, case, id=f"{spec.op}-{case.name}-{case.dtype}") for spec in SPECS.values() for case in cases_of(spec)
]


@pytest.mark.parametrize("isa", isa_names())
@pytest.mark.parametrize(("spec", "case"), EVERY)
def test_cpu_kernel_is_within_the_rule(spec, case, isa, poisoned):
    with forced("cpu", isa):
        verdict = run_case(spec, case)
    assert verdict.ok, verdict.why
    poisoned.check()


@pytest.mark.parametrize("isa", isa_names())
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_bits_do_not_depend_on_threads_or_repetition(spec, isa):
    threads = torch.get_num_threads()
    try:
        for case in cases_of(spec):
            inputs = case_inputs(spec, case)
            outputs = []
            for count in (1, threads, threads):
                torch.set_num_threads(count)
                with forced("cpu", isa), torch.no_grad():
                    outputs.append(results(spec.call(**inputs)))
            for first, second, third in zip(*outputs):
                assert (first.equal(second) and second.equal(third)) or first.isnan().any(), case.name
    finally:
        torch.set_num_threads(threads)


MUTANTS = [pytest.param(spec, name, id=f"{spec.op}-{name}") for spec in SPECS.values() for name in spec.mutants]


@pytest.mark.parametrize(("spec", "mutant"), MUTANTS)
def test_the_rule_catches_the_mutant(spec, mutant):
    """The test of the test: a wrong op must fail the rule somewhere."""

    def wrong(**inputs):
        dtype = case.dtype
        wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
        return tuple(y.to(dtype) for y in results(spec.mutants[mutant](**wide)))

    caught = False
    for case in cases_of(spec):
        caught = caught or not run_case(spec, case, wrong).ok
    assert caught, f"no case of {spec.op} notices that {mutant}"
