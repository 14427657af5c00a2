"""Every op's model shapes under pytest-benchmark, ours beside PyTorch's own way: `pytest benchmarks`.

`fastllm bench` measures the same shapes in turns, with limits and verdicts; this suite is for following them over time:
`pytest benchmarks --benchmark-autosave`, later `--benchmark-compare`.
"""

from __future__ import annotations

import pytest
import torch

from fastllm.measure.verify import copied, dtype_name, expected, run_case, select_cases

SHAPES = [
    pytest.param(spec, case, id=f"{spec.op}-{case.name}-{dtype_name(case.dtype)}")
    for spec, case in select_cases("bench", only_bench=True)
]


@pytest.mark.parametrize("who", ["fastllm", "torch"])  # varies fastest: the two stand one after the other
@pytest.mark.parametrize(("spec", "case"), SHAPES)
def bench_op(benchmark, spec, case, who):
    benchmark.group = f"{spec.op} {case.name} {dtype_name(case.dtype)}"
    inputs = copied(expected(spec, case).inputs)
    if who == "fastllm":
        verdict = run_case(spec, case)
        assert verdict.ok, f"what is not right has no speed: {verdict.why}"
    with torch.no_grad():
        benchmark(spec.call if who == "fastllm" else spec.torch, **inputs)
