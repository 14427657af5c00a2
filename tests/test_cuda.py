"""The CUDA C++ kernels: every op's small cases against float64, under many orders of threads, and wrong kernels, which must fail.

python tests/native/variant.py simt -m pytest tests/test_cuda.py     # `make simt`: on the executor, where there is no GPU

On a GPU the same cases run natively. What is not of the executor (the build, the module's sentences) is in test_build.py.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from dataclasses import replace

import pytest
import torch
from simt.mutants import MUTANTS, build
from test_int8_activations import WRITERS, differs

import fastllm
from fastllm.backends import cuda_executor, cuda_module
from fastllm.measure.poison import poisoned as poisoned_outputs
from fastllm.measure.verify import all_cases, case_inputs, device_of, forced, refusal, run_case, runs_here, to_device, too_slow
from fastllm.ops._case import Case
from fastllm.ops._op import OPS
from fastllm.ops.attention import reference
from fastllm.ops.attention.cuda import by_warpgroups

pytestmark = pytest.mark.skipif(
    not runs_here("cuda"), reason="python tests/native/variant.py simt -m pytest tests/test_cuda.py runs it"
)
on_executor = pytest.mark.skipif(not cuda_executor(), reason="the executor's: it has no GPU's equal")

SEEDS = [int(seed) for seed in os.environ.get("FASTLLM_SIMT_SEEDS", "1 2 3").split()]


def _long_rows(dtype, K):
    def inputs(g):
        x, residual = (torch.randn(2, K, generator=g).to(dtype) for _ in range(2))
        weight = torch.randn(K, generator=g).to(dtype)
        return {"x": x, "weight": weight, "residual": residual, "int8_group": 128}

    return Case(f"long 2x{K} residual g128", dtype, inputs)


# Of int8 outputs, more than the threads of a block hold.
LONG_ROWS = [(all_cases()["rms_norm_int8"], _long_rows(*row)) for row in ((torch.bfloat16, 33000), (torch.float32, 16500))]
CASES = [
    pytest.param(spec, case, id=f"{spec.op}-{case.name}-{case.dtype}")
    for spec, case in [(spec, case) for spec in all_cases().values() for case in spec.cases] + LONG_ROWS
    if any(backend.name == "cuda" for backend in OPS[spec.op].backends) and not too_slow(case, None, "cuda")
]


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_cuda_kernel_is_within_the_rule(spec, case):
    device = device_of("cuda")
    with forced("cuda"):
        why = refusal(spec, to_device(case_inputs(spec, case), device), "cuda")
        if why is not None:
            pytest.skip(why)
        for seed in SEEDS if cuda_executor() else (0,):
            if cuda_executor():
                cuda_module().seed(seed)
            with poisoned_outputs() as memory:
                verdict = run_case(spec, case, device=device)
                overrun = memory.overrun()
            assert verdict.ok, f"seed {seed}: {verdict.why}"
            assert not overrun, f"seed {seed}: {overrun}"
    for name, seen in cuda_module().launches().items() if cuda_executor() else ():
        assert seen["threads"] <= 1024 and seen["threads"] % 32 == 0, name
        assert seen["shared_bytes"] <= (227 if name.endswith("_sm90") else 99) << 10, name  # desktop GPUs have 99 KiB a block


def _with_nan(call):
    """PyTorch's own way would let NaN in keys that are not there reach its results."""
    return lambda k, v, kv_lens=None, **inputs: call(
        k=reference.valid(k, kv_lens), v=reference.valid(v, kv_lens), kv_lens=kv_lens, **inputs
    )


def _case_for_sm90(name, dtype, B, H, Hk, T, S, D, lens=None, sinks=False, **options):
    def inputs(g):
        q = torch.randn(B, T, H, D, generator=g).to(dtype).transpose(1, 2)
        k, v = (torch.randn(B, Hk, S + 3, D, generator=g).to(dtype)[:, :, :S] for _ in range(2))
        given = {"q": q, "k": k, "v": v, **options}
        if lens is not None:
            given["kv_lens"] = torch.tensor(lens)
            for b, n in enumerate(lens):
                k[b, :, n:] = v[b, :, n:] = float("nan")
        if sinks:
            given["sinks"] = torch.randn(H, generator=g) + 1
        return given

    return Case(name, dtype, inputs)


ATTENTION = replace(all_cases()["attention"], torch=_with_nan(all_cases()["attention"].torch))
# More keys than the ring of slots holds, more queries than a block has, and keys that are not there.
CASES_FOR_SM90 = [
    pytest.param(ATTENTION, case, id=f"attention-{case.name}-{dtype}")
    for dtype in (torch.bfloat16, torch.float16)
    for case in (
        _case_for_sm90("sm90 S 1150", dtype, 1, 1, 1, 66, 1150, 64),
        _case_for_sm90("sm90 S 700 D 128", dtype, 1, 2, 1, 40, 700, 128),
        _case_for_sm90("sm90 T 260 D 128, window 150, sinks", dtype, 1, 1, 1, 260, 260, 128, window=150, sinks=True),
        _case_for_sm90("sm90 cross, lengths", dtype, 3, 1, 1, 130, 300, 64, lens=(0, 129, 300), causal=False),
        _case_for_sm90("sm90 D 128, softcap, lengths", dtype, 2, 1, 1, 70, 400, 128, lens=(385, 90), softcap=20.0),
    )
]


def _not_finite(dtype, **names):
    nan = torch.tensor(0x7FC00001).int().view(torch.float32)  # its lowest byte is no 0: a GPU's own has 0xff there

    def inputs(g):
        tensors = {name: torch.randn(*shape, generator=g).to(dtype) for name, shape in names.items()}
        a, b = tensors.values()
        a[0, 3], a[1, 35], a[2] = torch.inf, nan, 1e-33
        b.view(-1, 40)[-1, 0] = torch.inf  # not in the group that ends past the row's end
        return {**tensors, "int8_group": 32}

    return Case(f"infinities and NaN in {next(iter(names))}", dtype, inputs)


# PyTorch's own way has other NaN than what int8 makes of a group: for the bits alone.
NOT_FINITE = [
    pytest.param(all_cases()[f"{op}_int8"], case, id=f"{op}_int8-{case.name}-{case.dtype}")
    for dtype in (torch.float32, torch.bfloat16)
    for op, case in (
        ("rms_norm", _not_finite(dtype, x=(4, 40), weight=(40,))),
        ("gated_activation", _not_finite(dtype, gate=(4, 40), up=(4, 40))),
    )
]


@pytest.mark.parametrize(("spec", "case"), [p for p in CASES if p.values[0].op in WRITERS] + NOT_FINITE)
def test_int8_outputs_are_the_result_rounded(spec, case):
    inputs = to_device(case_inputs(spec, case), device_of("cuda"))
    with forced("cuda"):
        why = refusal(spec, inputs, "cuda")
        if why is not None:
            pytest.skip(why)
        assert not differs(spec, inputs)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_integers_that_a_norm_or_a_gate_wrote_give_the_bits_of_a_product_that_rounds(dtype, bits):
    """And take no launch of their own."""
    g = torch.Generator().manual_seed(bits)
    x, gate = torch.randn(13, 160, generator=g).to(dtype), torch.randn(13, 320, generator=g).to(dtype)
    w = fastllm.quantize(torch.randn(48, 160, generator=g), bits, 32)
    x, gate, w = (t.to(device_of("cuda")) for t in (x, gate, w))
    with forced("cuda"):
        for op in (functools.partial(fastllm.rms_norm, x, None), functools.partial(fastllm.gated_activation, gate)):
            expected = fastllm.quant_matmul(op(), w, activations="int8")
            before = _launches_that_round()
            y = fastllm.quant_matmul(op(int8_group=32), w)
            assert y.dtype == dtype and torch.equal(y, expected)
            assert _launches_that_round() == before


def _launches_that_round():
    return cuda_module().launches()["quant_matmul, x in int8"]["count"] if cuda_executor() else 0


@pytest.fixture
def hopper():
    cuda_module().use_capability(90)
    yield
    cuda_module().use_capability(80)


def _launches_of_sm90():
    return cuda_module().launches().get("attention_prefill_sm90", {"count": 0})["count"]


@on_executor
@pytest.mark.parametrize(("spec", "case"), [p for p in CASES if p.values[0].op == "attention"] + CASES_FOR_SM90)
def test_prefill_with_warpgroups_is_within_the_rule(spec, case, hopper):
    inputs = case_inputs(spec, case)
    optional = {name: inputs.get(name) for name in ("block_table", "k_scale")}
    if not by_warpgroups(inputs["q"], inputs["k"], **optional) or not inputs["q"].numel():
        pytest.skip("the kernel is not for it")
    before = _launches_of_sm90()
    test_cuda_kernel_is_within_the_rule(spec, case)
    assert _launches_of_sm90() > before


@on_executor
def test_bits_do_not_depend_on_the_order_of_threads():
    """No kernel adds in the order of arrival."""
    for spec in all_cases().values():
        case = next((c for c in spec.cases if not too_slow(c, None, "cuda") and c.dtype == torch.bfloat16), None)
        if case is None:
            continue
        with forced("cuda"):
            if refusal(spec, case_inputs(spec, case), "cuda") is not None:
                continue
            results = []
            for seed in SEEDS:
                cuda_module().seed(seed)
                results.append(spec.call(**case_inputs(spec, case)))
        first, *others = ([y] if isinstance(y, torch.Tensor) else list(y) for y in results)
        for other in others:
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, other)), spec.op


# ---------------------------------------------------------------- wrong kernels


# FASTLLM_MUTANTS=one: the first of each file, for who has no five minutes.
CHOSEN = MUTANTS if os.environ.get("FASTLLM_MUTANTS") != "one" else [*{m.file: m for m in reversed(MUTANTS)}.values()]


def _faults(spec, case):
    """What is wrong with a case's results, in words."""
    if all(case is not p.values[1] for p in NOT_FINITE):
        verdict = run_case(spec, case, device="cpu")
        if not verdict.ok:
            yield verdict.why
    if spec.op in WRITERS and (what := differs(spec, case_inputs(spec, case))):
        yield f"{what} are not those of the result rounded"


@on_executor
@pytest.mark.parametrize("mutant", CHOSEN, ids=lambda m: f"{m.file}: {m.what}")
def test_a_wrong_kernel_fails(mutant, tmp_path, monkeypatch):
    module = build(mutant, tmp_path)
    module.use_capability(90 if "sm90" in mutant.file else 80)
    for name in {spec.call.__module__.rpartition(".")[0] for spec in all_cases().values()}:
        if importlib.util.find_spec(f"{name}.cuda"):
            monkeypatch.setattr(importlib.import_module(f"{name}.cuda"), "_cuda", module)
    caught = []
    for spec, case in (p.values for p in CASES + CASES_FOR_SM90 + NOT_FINITE):
        if not all(word in f"{spec.op}-{case.name}-{case.dtype}" for word in mutant.cases.split(" and ")):
            continue
        with forced("cuda"):
            if refusal(spec, case_inputs(spec, case), "cuda") is not None:
                continue
            for seed in SEEDS:
                module.seed(seed)
                try:
                    caught += _faults(spec, case)
                except RuntimeError as error:  # the executor's: a deadlock, lanes in different instructions
                    caught.append(str(error))
        if caught:
            break
    assert caught
    print(caught[0])
