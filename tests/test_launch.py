"""Launch tables: which launch a call gets, what tuning keeps, and that nothing wrong is ever kept.

The kernels run in Triton's interpreter where there is no GPU: TRITON_INTERPRET=1 pytest tests/test_launch.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from fastllm.measure import tune
from fastllm.measure.timing import Timing
from fastllm.measure.verify import all_cases, forced
from fastllm.ops import _launch
from fastllm.ops._launch import GPU, LaunchTable, asked, load_tuned
from fastllm.ops._triton import interpreting

needs_kernels = pytest.mark.skipif(
    not (interpreting() or torch.cuda.is_available()), reason="TRITON_INTERPRET=1 pytest tests/test_launch.py runs it"
)


def table():
    return LaunchTable("k", lambda gpu, n: {"BLOCK": n, "num_warps": gpu.major}, lambda gpu, n: [])


def test_the_shipped_launch_depends_on_the_gpu_and_the_key():
    assert table().shipped(GPU(8, 0), 64) == {"BLOCK": 64, "num_warps": 8}
    assert table()(torch.device("cuda"), 64) == {"BLOCK": 64, "num_warps": 9}  # none here: Hopper is assumed


def test_names_and_shared_memory_of_gpus():
    assert [str(g) for g in (GPU(8, 0), GPU(12, 0), GPU(9, 4, hip=True))] == ["sm_80", "sm_120", "gfx942"]
    assert GPU(9, 0).shared_bytes > GPU(12, 0).shared_bytes > GPU(9, 4, hip=True).shared_bytes


def test_a_launch_is_replaced_for_a_while():
    one, device = table(), torch.device("cpu")
    with one.using(device, (64,), {"BLOCK": 1, "num_warps": 1}):
        assert one(device, 64)["BLOCK"] == 1
        assert one(device, 32)["BLOCK"] == 32
    assert one(device, 64)["BLOCK"] == 64


@pytest.mark.parametrize(
    ("kept", "block"),
    [
        ({"k 64": {"BLOCK": 7, "num_warps": 2}}, 7),
        ({"k 32": {"BLOCK": 7, "num_warps": 2}}, 64),  # another key's
        ({"k 64": {"BLOCK": 7}}, 64),  # another version's
        ({"k 64": {"BLOCK": "7", "num_warps": 2}}, 64),
        ([], 64),
        ("no JSON {", 64),
    ],
)
def test_a_tuned_launch_is_used_if_it_fits(tmp_path, monkeypatch, kept, block):
    file = tmp_path / "launches.json"
    file.write_text(kept if isinstance(kept, str) else json.dumps(kept), encoding="utf-8")
    monkeypatch.setattr(_launch, "_tuned", lambda device: load_tuned(file))
    assert table()(torch.device("cuda"), 64)["BLOCK"] == block


def test_no_file_is_no_launches(tmp_path):
    assert load_tuned(tmp_path / "none.json") == {}


class Clock:
    """Times that are made up: the contestants' order of speed is what a test says."""

    def __init__(self, *microseconds):
        self.microseconds = microseconds

    def __call__(self, calls, sets, seconds):
        for name, call in calls.items():
            call(**sets[name][0])  # each must run
        return {name: Timing((us * 1e-6,)) for name, us in zip(calls, self.microseconds, strict=True)}, ""


@pytest.fixture
def rms_norm(monkeypatch):
    """The op's table with three candidates: a right one, one that leaves out most of a row, one that no kernel takes."""
    pytest.importorskip("triton")
    from fastllm.ops.rms_norm import triton

    shipped = triton._LAUNCHES.shipped
    right = lambda gpu, k: {**shipped(gpu, k), "num_warps": 2}  # noqa: E731
    candidates = lambda gpu, k: [  # noqa: E731
        {**right(gpu, k), "BLOCK_K": 8},
        right(gpu, k),
        {**right(gpu, k), "BLOCK_K": 24},  # not a power of two
    ]
    monkeypatch.setattr(triton, "_LAUNCHES", LaunchTable("rms_norm", shipped, candidates))
    spec = all_cases()["rms_norm"]
    return spec, next(case for case in spec.cases if case.name == "odd 3x7x131" and case.dtype == torch.bfloat16)


@needs_kernels
@pytest.mark.parametrize(("times", "best"), [((10.0, 5.0), 2), ((10.0, 9.9), 1), ((5.0, 10.0), 1)])
def test_tuning_keeps_the_fastest_that_is_right(rms_norm, times, best):
    done = set()
    (found,) = tune.tune_case(*rms_norm, done, timer=Clock(*times))
    assert (found.tried, found.wrong, found.failed) == (3, 1, 1)
    assert found.best["num_warps"] == best
    assert found.entry in done
    assert tune.tune_case(*rms_norm, done, timer=Clock(*times)) == []


@needs_kernels
def test_calls_tell_which_entries_they_ask_for(rms_norm):
    spec, case = rms_norm
    with forced("triton"), asked() as entries:
        tune.tune_case(spec, case, set(), timer=Clock(1.0, 2.0))
    assert list(entries) == [("rms_norm", (256,))]
    with asked() as entries:
        pass
    assert not entries


def test_tuned_launches_are_added_to_the_file(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    launch = {"BLOCK": 8, "num_warps": 1}
    first, second = (tune.Tuned(f"k {n}", "case", {}, 2.0, launch, 1.0, 1, 0, 0) for n in (1, 2))
    device = torch.device("cpu")
    tune.save([first], device)
    file = tune.save([second], device)
    assert load_tuned(_launch.tuned_file(device)) == {"k 1": launch, "k 2": launch}
    assert file.startswith(str(tmp_path))


def test_tune_needs_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    from fastllm.cli import main

    assert main(["tune"]) != 0
    assert "expected a GPU" in capsys.readouterr().err


@needs_kernels
def test_keys_and_values_that_come_through_tensor_descriptors(monkeypatch):
    """What a Hopper GPU's copy engine would bring: a launch that `fastllm tune` may choose."""
    pytest.importorskip("triton")
    from fastllm.measure.verify import device_of, refusal, run_case, to_device
    from fastllm.ops.attention import triton

    if not hasattr(triton.tl, "make_tensor_descriptor"):
        pytest.skip(f"Triton {triton.triton.__version__} has no descriptors")
    shipped, made = triton._PREFILL_LAUNCHES.shipped, []
    described = LaunchTable(
        "prefill", lambda gpu, *key: {**shipped(gpu, *key), "TMA": 1, "SPECIALIZE": 1}, lambda gpu, *key: []
    )
    monkeypatch.setattr(triton, "_PREFILL_LAUNCHES", described)
    set_allocator = triton.triton.set_allocator
    monkeypatch.setattr(triton.triton, "set_allocator", lambda give: (made.append(give), set_allocator(give)))
    spec, device = all_cases()["attention"], device_of("triton")
    for case in spec.cases:
        if case.dtype == torch.bfloat16 and 10_000 < case.flops < 1_500_000:
            with forced("triton"):
                if refusal(spec, to_device(case.inputs(torch.Generator()), device), "triton") is None:
                    verdict = run_case(spec, case, device=device)
                    assert verdict.ok, f"{case.name}: {verdict.why}"
    assert len(made) >= 4  # of the cases, those of more than a few queries, aligned and not in pages


@pytest.mark.parametrize(
    ("target", "launch", "matrix", "warps"),
    [
        ("sm_90", {"TMA": 1}, "wgmma", "8"),
        ("sm_100", {"TMA": 1, "SPECIALIZE": 1}, "tcgen05", "16"),
        ("sm_120", {"TMA": 1, "SPECIALIZE": 1}, "mma.sync", "12"),
    ],
)
def test_descriptors_and_warps_of_different_work_compile(target, launch, matrix, warps):
    """Eight warps do the softmax; those that fetch tiles and issue products come on top."""
    pytest.importorskip("triton")
    from fastllm.ops.attention import triton

    if not any(one | launch == one for one in triton._prefill_candidates(GPU(10, 0), 64, 2, 0, 0, 0)):
        pytest.skip(f"Triton {triton.triton.__version__} cannot")
    code = (
        "from dataclasses import replace\n"
        "from fastllm.measure.compiled import builds, compile_one\n"
        f"build = next(b for _, b in builds('{target}', ['attention']) if b.name == 'prefill D=64 bf16 causal')\n"
        f"one = compile_one('attention', replace(build, launch={{**build.launch, **{launch}}}), '{target}')\n"
        "assert one.ok, one.why\n"
        "print(one.matrix, one.warps)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert matrix in done.stdout
    assert done.stdout.split()[-1] == warps


def test_descriptors_are_for_gpus_that_have_a_copy_engine():
    pytest.importorskip("triton")
    from fastllm.ops.attention import triton

    def flags(*gpu):
        return {(x["TMA"], x["SPECIALIZE"]) for x in triton._prefill_candidates(GPU(*gpu), 128, 2, 0, 0, 0)}

    assert flags(8, 0) == flags(9, 4, True) == {(0, 0)}
    if hasattr(triton.tl, "make_tensor_descriptor"):
        assert flags(9, 0) == {(0, 0), (1, 0)}
        assert flags(10, 0) == flags(12, 0) >= flags(9, 0)
    shipped = triton._shipped_prefill(GPU(10, 0), 128, 2, 0, 0, 0)
    assert (shipped["TMA"], shipped["SPECIALIZE"]) == (0, 0)  # until a GPU has measured it
