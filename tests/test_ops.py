"""All ops x all backends x all rungs, driven by each op's cases.py. No op is named here."""

from __future__ import annotations

import pytest
import torch

from fastllm.backends import cpu_module, isa_names
from fastllm.measure.verify import all_cases, case_inputs, expected, forced, mutants, refusal, results, run_case, too_slow

SPECS = all_cases()
THREADED_FLOPS = 200_000_000  # enough for a dozen chunks; the emulated and sanitized runs have to do them thrice too
EVERY = [pytest.param(spec, case, id=f"{spec.op}-{case.name}-{case.dtype}") for spec in SPECS.values() for case in spec.cases]


@pytest.mark.parametrize("isa", isa_names())  # the fastest to vary: a case's reference is computed once
@pytest.mark.parametrize(("spec", "case"), EVERY)
def test_cpu_kernel_is_within_the_rule(spec, case, isa, poisoned):
    if too_slow(case, isa):
        pytest.skip("large, on the scalar rung")
    why = refusal(spec, expected(spec, case).inputs, "cpu")
    if why is not None:
        pytest.skip(why)
    with forced("cpu", isa):
        verdict = run_case(spec, case)
    assert verdict.ok, verdict.why
    poisoned.check()


def bits(t):
    """As bytes, so that a NaN equals itself."""
    return t.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("isa", isa_names())
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_bits_do_not_depend_on_threads_or_repetition_or_the_way_to_memory(spec, isa):
    threads, kept = torch.get_num_threads(), cpu_module().set_past_caches(1 << 60)
    try:
        for case in spec.cases:
            if case.flops > THREADED_FLOPS:
                continue
            inputs = case_inputs(spec, case)
            if refusal(spec, inputs, "cpu") is not None:
                continue
            outputs = []
            for count, past_caches_from in ((1, 1 << 60), (threads, 1 << 60), (threads, 0)):
                torch.set_num_threads(count)
                cpu_module().set_past_caches(past_caches_from)
                with forced("cpu", isa), torch.no_grad():
                    outputs.append(results(spec.call(**inputs)))
            for first, second, third in zip(*outputs):
                assert case.by_torch or bits(first).equal(bits(second)), f"{case.name}: threads"
                assert bits(second).equal(bits(third)), f"{case.name}: repetition, past the caches"
    finally:
        torch.set_num_threads(threads)
        cpu_module().set_past_caches(kept)


MUTANTS = [pytest.param(spec.op, name, id=f"{spec.op}-{name}") for spec in SPECS.values() for name in spec.mutants]


@pytest.mark.parametrize(("op", "mutant"), MUTANTS)
def test_the_rule_catches_the_mutant(op, mutant):
    """The test of the test: a wrong op must fail the rule somewhere."""
    found = next(m for m in mutants(op) if m.mutant == mutant)
    assert found.case, f"no case of {op} notices that {mutant}"
