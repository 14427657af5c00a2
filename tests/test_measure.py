"""The measuring tools themselves: the rule, the protocol, the limits, what they print and write."""

from __future__ import annotations

import json
import math
import types
from dataclasses import replace

import pytest
import torch

from fastllm import backends
from fastllm.measure import bench, limits, others, timing
from fastllm.measure.check import check
from fastllm.measure.poison import poisoned
from fastllm.measure.report import markdown, number, print_table, write_json
from fastllm.measure.verify import all_cases, case_inputs, checked_isas, expected, run_case, select_cases, too_slow
from fastllm.ops import _op
from fastllm.ops.quant_matmul.cases import random_weight

needs_cpu_kernels = pytest.mark.skipif(backends.cpu_module() is None, reason="fastllm._cpu is not built")


# ---------------------------------------------------------------- the rule


@pytest.fixture
def triple():
    r = torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = (r * (1 + 1e-7 * torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))).float()
    return r.float(), r, p


def test_the_rule_holds_for_one_rounding(triple):
    verdict = check(*triple)
    assert verdict.ok
    assert verdict.share < 1


def test_one_wrong_element_of_many_breaks_it(triple):
    y, r, p = triple
    y[3, 5] += 1e-4
    verdict = check(y, r, p)
    assert not verdict.ok
    assert verdict.share > 1
    assert "worst at (3, 5)" in verdict.why


def test_a_bias_that_the_maximum_hides_breaks_it(triple):
    _, r, _ = triple
    y, p = r.float(), r.float()
    p[0, 0] += 0.01  # PyTorch is far off in one element: the bound of the worst element is wide
    verdict = check(y * 1.002, r, p)
    assert not verdict.ok
    assert "nmse" in verdict.why


@pytest.mark.parametrize("left", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_must_stand_where_the_reference_has_it(triple, left):
    y, r, p = triple
    y[1, 2] = left
    assert "not finite" in check(y, r, p).why
    r[1, 2] = p[1, 2] = math.inf
    assert check(y, r, p).ok is (left == math.inf)


def test_nan_is_no_overflow(triple):
    y, r, p = triple
    p[0, 0], y[0, 0] = math.inf, math.nan  # PyTorch's op overflows here; unwritten memory must not pass for it
    assert not check(y, r, p).ok
    y[0, 0] = math.inf
    assert check(y, r, p).ok


def test_shapes_integers_and_the_references_dtype_are_exact(triple):
    y, r, p = triple
    assert "shape" in check(y[:3], r, p).why
    assert "expected torch.float64" in check(y, r.float(), p).why
    whole = torch.arange(6)
    assert check(whole, whole, whole).ok
    assert check(whole + (whole == 2), whole, whole).why == "1 integers differ"


def test_wrong_number_of_results_is_a_failure():
    spec = all_cases()["rms_norm"]
    case = spec.cases[0]
    assert run_case(spec, case, lambda **_: ()).why == "0 results, expected 1"


# ---------------------------------------------------------------- cases


def test_the_reference_is_computed_once_for_a_cases_rungs():
    spec = all_cases()["rms_norm"]
    calls = []

    def counting(**inputs):
        calls.append(1)
        return spec.reference(**inputs)

    counted = replace(spec, op="counted", reference=counting)
    first = expected(counted, counted.cases[0])
    assert expected(counted, counted.cases[0]) is first
    assert len(calls) == 1


def test_inputs_are_the_same_in_every_process():
    spec = all_cases()["rms_norm"]
    case = next(c for c in spec.cases if c.name == "odd 3x7x131" and c.dtype == torch.float32)
    assert case_inputs(spec, case)["x"].flatten()[:3].tolist() == case_inputs(spec, case)["x"].flatten()[:3].tolist()


def test_cases_are_named_whole_or_in_part():
    chosen = select_cases("verify", ["rms_norm"], ["bf16"], "odd 3x7x131")
    assert [case.name for _, case in chosen] == ["odd 3x7x131"]
    assert len(select_cases("verify", ["rms_norm"], ["fp32"], "llama-3.2-1b")) >= 3
    assert all(case.bench for _, case in select_cases("bench", only_bench=True))
    with pytest.raises(ValueError, match="--case is 'nothing like it', expected a case's name or a part of it: .*odd"):
        select_cases("verify", ["rms_norm"], None, "nothing like it")
    with pytest.raises(ValueError, match="--dtype is 'fp8'"):
        select_cases("verify", None, ["fp8"])
    with pytest.raises(ValueError, match="--isa is 'sse', expected one of"):
        checked_isas("verify", ["sse"])


def test_only_large_cases_on_the_scalar_rung_are_left_out():
    case = all_cases()["rms_norm"].cases[0]
    large = replace(case, flops=10**12)
    assert too_slow(large, "scalar")
    assert not too_slow(large, "avx2")
    assert not too_slow(case, "scalar")


# ---------------------------------------------------------------- poison


def test_what_is_not_written_and_what_is_written_outside_is_seen():
    before = _op.empty
    with poisoned() as memory:
        y = _op.empty((3, 4), dtype=torch.bfloat16)
        assert y.isnan().all()
        assert not memory.overrun()
        z = _op.empty((3, 4), dtype=torch.int32)
        z.as_strided((13,), (1,)).fill_(0)
        assert "1 elements after an output of 12 torch.int32" in memory.overrun()
        z.as_strided((2,), (1,), z.storage_offset() - 1).fill_(0)
        y = _op.empty((5,), dtype=torch.float32)
        y.as_strided((2,), (1,), y.storage_offset() - 1).fill_(0)
        with pytest.raises(AssertionError, match="1 elements before an output of 5"):
            memory.check()
    assert _op.empty is before


# ---------------------------------------------------------------- timing


def test_quantiles_and_ratios_of_pairs():
    assert timing.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert timing.quantile([0.0, 10.0], 0.2) == 2.0
    # The machine slows down threefold in the middle: the ratio of each pair does not see it.
    ours, rival = timing.Timing((1.0, 3.0, 3.0)), timing.Timing((2.0, 6.0, 6.0))
    assert timing.ratio(rival, ours) == 2.0
    assert ours.p20 <= ours.median <= ours.p80


def test_contestants_take_turns_and_cold_ones_go_round_the_argument_sets():
    order, seen = [], []

    def contestant(name):
        def call(n):
            order.append(name)
            seen.append(n)

        return call

    calls = {"a": contestant("a"), "b": contestant("b")}
    times = timing.in_turns(calls, [{"n": n} for n in range(4)], cold=True, seconds=0.0, warmup=0.0)
    assert len(times["a"].samples) == len(times["b"].samples) == timing.MIN_TURNS
    assert order == ["a", "b"] * (1 + timing.MIN_TURNS)
    assert seen[2:8] == [1, 2, 3, 0, 1, 2]  # every call on the next set
    seen.clear()
    timing.in_turns(calls, [{"n": n} for n in range(4)], seconds=0.0, warmup=0.0)
    assert set(seen) == {0}


def test_untimed_calls_come_before_the_timed_ones_of_a_warm_turn(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def contestant(name, takes):
        def call():
            order.append(name)
            now[0] += takes

        return call

    calls = {"a": contestant("a", 1e-3), "b": contestant("b", 20e-6)}
    times = timing.in_turns(calls, [{}], seconds=0.0, warmup=0.0)
    assert order == ["a", "b"] + (["a"] * (4 + 1) + ["b"] * (200 + 5)) * timing.MIN_TURNS
    assert times["a"].samples == pytest.approx([1e-3] * timing.MIN_TURNS)


# ---------------------------------------------------------------- limits

LIMITS = limits.Limits("avx2", 2, 20.0, 100.0, 200.0, 10.0, 80.0, 160.0, 300.0, 600.0, 700.0, None)


def test_the_shortest_transfer(monkeypatch):
    monkeypatch.setattr(limits, "caches", lambda: limits.Caches(1 << 20, 32 << 20))
    assert [LIMITS.level(size) for size in (1 << 20, 4 << 20, 64 << 20)] == ["l2", "l3", "memory"]
    assert LIMITS.level(1, cold=True) == "memory"
    # All read; half written, which is a copy; a quarter written: half of the bytes at the copy's speed.
    assert LIMITS.transfer(64 << 20, 0) == (pytest.approx((64 << 20) / 20e9), "read memory")
    assert LIMITS.transfer(64 << 20, 32 << 20) == (pytest.approx((64 << 20) / 10e9), "copy memory")
    seconds, _ = LIMITS.transfer(64 << 20, 16 << 20)
    assert seconds == pytest.approx((32 << 20) / 10e9 + (32 << 20) / 20e9)


def test_bf16_arithmetic_is_fp32s_where_there_is_no_instruction():
    assert LIMITS.peak("bf16") == LIMITS.peak("fp32") == 300e9
    assert replace(LIMITS, bf16=500.0).peak("bf16") == 500e9
    assert LIMITS.peak("int8") == 600e9
    assert LIMITS.peak("int4") == 700e9


@needs_cpu_kernels
def test_limits_are_measured_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(limits, "_measured", {})
    monkeypatch.setattr(limits, "_large", lambda: 2 * limits.caches().l3)
    best = limits.limits(threads=1, fresh=True, seconds=0.3)
    assert all(value > 0 for name, value in vars(best).items() if name not in ("isa", "bf16"))
    assert (best.bf16 is None) == (best.isa != "avx512_bf16")
    if best.isa != "scalar":
        # Eight lanes and more against one: far enough apart for any disturbance.
        scalar = limits.limits("scalar", 1, fresh=True, seconds=0.3)
        assert best.fp32 > scalar.fp32 > 0
        assert best.int8 > scalar.int8 > 0
    # Kept for the process, and for the next one.
    assert limits.limits(threads=1) is best
    limits._measured.clear()
    assert limits.limits(threads=1) == best
    limits._measured.clear()
    limits.cache_file().write_text("{not json")
    monkeypatch.setattr(limits, "_measure", lambda *_: LIMITS)
    assert limits.limits(threads=1) is LIMITS


@needs_cpu_kernels
@pytest.mark.parametrize("isa", backends.isa_names())
def test_the_loops_do_what_they_are_counted_for(isa):
    module, tiles = backends.cpu_module(), torch.ones(1024)
    source, target = torch.randn(2, 512), torch.zeros(2, 512)
    with backends.use_isa(isa):
        assert module.limit_loop("read", source, target, tiles, 3) == 3 * source.nbytes
        assert not target.any()
        for name in ("copy", "stream"):
            assert module.limit_loop(name, source, target.zero_(), tiles, 3) == 3 * 2 * source.nbytes
            assert target.equal(source)
        lanes = {"scalar": 1, "avx2": 8}.get(isa, 16)
        assert module.limit_loop("fp32", source, target, tiles, 5) == 2 * 5 * 12 * 2 * lanes
        bytes_a_lane = 4 * lanes if lanes > 1 else 1
        assert module.limit_loop("int8", source, target, tiles, 5) == 2 * 5 * 12 * 2 * bytes_a_lane
        assert module.limit_loop("int4", source, target, tiles, 5) == 2 * 5 * (9 if isa == "avx2" else 12) * 2 * bytes_a_lane
        assert (module.limit_loop("bf16", source, target, tiles, 5) > 0) == (isa == "avx512_bf16")


@needs_cpu_kernels
def test_limits_of_the_moment_are_not_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(limits, "_measured", {})
    monkeypatch.setattr(limits, "_measure", lambda *_: LIMITS)
    assert limits.limits_now(1, 0.1) is LIMITS
    assert not limits._measured
    assert not limits.cache_file().exists()


@needs_cpu_kernels
def test_a_round_trip_takes_two_cores(monkeypatch):
    trip = limits.round_trip()
    if trip is not None:
        assert 1 < trip < 20e6  # ns: a cycle, and all the time there was
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda pid: {0}, raising=False)
    assert limits.round_trip() is None


@needs_cpu_kernels
def test_limits_refuse_what_is_not_there():
    with pytest.raises(ValueError, match="limits: isa is 'sse'"):
        limits.limits("sse")
    with pytest.raises(ValueError, match="limits: threads is -1"):
        limits.limits(threads=-1)
    module, ones = backends.cpu_module(), torch.ones(1, 128)
    with pytest.raises(ValueError, match="limit_loop: name is 'write'"):
        module.limit_loop("write", ones, ones, torch.ones(1024), 1)
    with pytest.raises(ValueError, match="rows of 100 floats, expected a multiple of 128"):
        module.limit_loop("read", torch.ones(1, 100), torch.ones(1, 100), torch.ones(1024), 1)
    with pytest.raises(ValueError, match="to must be a contiguous fp32 tensor as large as from"):
        module.limit_loop("copy", ones, torch.ones(1, 64), torch.ones(1024), 1)
    with pytest.raises(ValueError, match="to must start with a cache line"):
        module.limit_loop("stream", ones, torch.ones(129)[1:].view(1, 128), torch.ones(1024), 1)


# ---------------------------------------------------------------- rows


@needs_cpu_kernels
def test_the_share_of_the_limit_is_the_shortest_time_over_ours(monkeypatch):
    monkeypatch.setattr(bench, "measured_limits", lambda isa, threads: LIMITS)
    spec = all_cases()["rms_norm"]
    case = replace(spec.cases[0], bytes=64 << 30, flops=600 * 10**9)
    ours = timing.Timing((10.0,))
    share = bench._share(spec, case, ours, 0, cold=True)
    assert share["limited_by"] == "read memory"
    assert share["unit"] == "GB/s"
    assert share["pct_of_limit"] == pytest.approx(100 * (64 << 30) / 20e9 / 10)
    assert share["limit"] == pytest.approx(20.0)
    bound = replace(spec, compute_bound=lambda case: True)
    share = bench._share(bound, replace(case, arithmetic="int8"), ours, 0, cold=True)
    assert share == {"rate": 60.0, "unit": "GOP/s", "limit": 600.0, "limited_by": "int8", "pct_of_limit": 10.0}


def test_a_missing_or_failing_compiler_is_a_reason_in_the_row(monkeypatch):
    spec = all_cases()["rms_norm"]

    def broken(*_, **__):
        def call(**inputs):
            raise RuntimeError("no such header\nand more")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(bench.shutil, "which", lambda name: "/usr/bin/c++")
    assert bench._compiled(spec, {"x": torch.ones(2, 2), "weight": None}) == (
        None,
        "torch.compile: RuntimeError: no such header",
    )
    monkeypatch.setattr(bench.shutil, "which", lambda name: None)
    assert bench._compiled(spec, {}) == (None, "torch.compile: no C++ compiler is installed")


def test_cold_arguments_fill_the_cache_twice(monkeypatch):
    monkeypatch.setattr(bench, "caches", lambda: limits.Caches(1 << 10, 1 << 20))
    inputs = {"x": torch.ones(1 << 16), "n": 3}
    sets = bench._cold(inputs, 1 << 18, bench._last_level("cpu"))
    assert len({one["x"].data_ptr() for one in sets}) == len(sets) == 8
    assert all(one["n"] == 3 and one["x"].equal(inputs["x"]) for one in sets)
    assert bench._cold(inputs, 64, 1 << 20) == []  # 32768 copies of 256 KiB


# ---------------------------------------------------------------- tables and files


def test_numbers_read_well():
    shown = [0.000123456, 0.5, 12.3456, 1234.5, 0.0, math.nan, math.inf, None, True, 7, "words", 1.5e-9, 2e12]
    assert [number(value) for value in shown] == (
        ["1.23e-04", "0.500", "12.3", "1234", "0", "-", "inf", "-", "True", "7", "words", "1.50e-09", "2.00e+12"]
    )


@pytest.mark.parametrize("terminal", [False, True])
def test_tables_are_never_cut_off(terminal, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("rich.console.Console.is_terminal", terminal)
    rows = [("a name that is long " * 3, 12.34, "words " * 9), ("b", 1234567.0, "x" * 30)]
    print_table("Title", ("name", "microseconds a call", "why"), rows, fold=(2,))
    lines = capsys.readouterr().out.splitlines()
    assert any("a name that is long a name that is long a name that is long" in line and "12.3" in line for line in lines)
    assert sum(line.count("words") for line in lines) == 9
    assert sum(line.count("x") for line in lines) == 30
    assert any("microseconds a call" in line for line in lines)
    assert (len(lines) == 7) is not terminal  # folded on the narrow terminal only


def test_markdown_escapes_its_own_bars():
    assert markdown(("a", "b"), [("x|y", 1.0)]) == "| a | b |\n|---|---:|\n| x\\|y | 1.00 |"


def test_json_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "out.json"
    write_json(file, {"a": [1.5, math.nan, math.inf], "b": (True, None)})
    assert json.loads(file.read_text()) == {"a": [1.5, None, None], "b": [True, None]}
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text())["b"] == [True, None]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


# ---------------------------------------------------------------- PyTorch's products of quantised weights, rivals on a GPU


def quantised_case(n: int, k: int, **form) -> tuple[dict, torch.Tensor]:
    """Arguments of 33 tokens in bf16, and x times the weight in fp32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(33, k, generator=generator).bfloat16()
    w = random_weight(generator, n, k, **form)
    return {"x": x, "w": w, "activations": "float"}, x.float() @ w.dequantize(torch.float32).T


@pytest.mark.parametrize(
    "form",
    [
        {"bits": 4, "group_size": 64, "form": "zero"},
        {"bits": 4, "group_size": 128, "form": "minimum"},
        {"bits": 4, "group_size": 32, "form": "both"},
    ],
)
def test_the_int4_rival_holds_the_same_weight(form, monkeypatch):
    """Its packing is a GPU's; what it is given, decoded as its documentation says, is the weight to bf16's rounding of scales."""
    inputs, expected = quantised_case(48, 640, **form)
    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", lambda data, tiles: data)
    monkeypatch.setattr(torch, "_weight_int4pack_mm", int4pack_mm)
    y = others.torch_int4pack(**others.hold_int4pack(inputs))
    assert (y - expected).abs().max() < 0.02 * expected.abs().max()
    for other in ({"bias": torch.zeros(48)}, {"activations": "int8"}):
        with pytest.raises(NotImplementedError, match="bias" if "bias" in other else "activations"):
            others.hold_int4pack({**inputs, **other})


def int4pack_mm(x, packed, group_size, scales_and_zeros):
    q = torch.stack((packed >> 4, packed & 15), -1).flatten(1).float()[:, : x.shape[1]]
    scale, zero = scales_and_zeros.float().transpose(0, 1).repeat_interleave(group_size, 1).unbind(-1)
    return x.float() @ ((q - 8) * scale + zero).T


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_the_int8_rivals_hold_the_same_weight(activations):
    inputs, expected = quantised_case(64, 256, bits=8, group_size=-1, form="zero")
    held = others.hold_int8({**inputs, "activations": activations})
    right, wrong = others.torch_int8pack, others.torch_int_mm
    if activations == "int8":
        right, wrong = wrong, right
    with pytest.raises(NotImplementedError, match="activations"):
        wrong(**held)
    assert (right(**held).float() - expected).abs().max() < 0.02 * expected.abs().max()
    with pytest.raises(NotImplementedError, match="symmetric int8 rows"):
        others.hold_int8(quantised_case(64, 256, bits=8, group_size=128, form="zero")[0])
