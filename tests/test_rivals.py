"""The rivals' harness, without a rival: what it computes, in which order it runs, what a failure leaves, the models that it makes."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

import fastllm
from fastllm.models.loaders import read_checkpoint
from fastllm.quant import QuantizedTensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is no part of the package
from benchmarks import gpu_step
from benchmarks.rivals import common, contestants, environments, make_models, report, run

TINY = common.Shape("tiny", 64, 2, 4, 2, 32, 96, 512, 10000.0, False, max_position_embeddings=128)
LIMITS = {"isa": "avx2", "read_memory": 20.0, "int8": 500.0, "int4": 500.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny model in every form."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(common.SHAPES, "tiny", TINY)
        patch.setattr(make_models, "HOME", tmp_path_factory.mktemp("rivals"))
        make_models.make("tiny", list(make_models.FORMS))
        return make_models.HOME / "models" / "tiny"


def test_every_form_holds_the_same_weights(model):
    exact = read_checkpoint(model / "hf").tensors
    for form, step in (("q4_0", 1 / 8), ("q8_0", 1 / 127)):
        for name, stored in read_checkpoint(model / f"{form}.gguf").tensors.items():
            wanted = exact[name].float()
            if not isinstance(stored, QuantizedTensor):
                assert torch.equal(stored, wanted), name
                continue
            # A block's values are rounded to at most half of its largest one's step; Q4_0's other end is one step short.
            bound = wanted.view(len(wanted), -1, 32).abs().amax(-1, keepdim=True) * step * 1.01
            error = (stored.dequantize(torch.float32) - wanted).view(len(wanted), -1, 32).abs()
            assert (error <= bound).all(), name


def test_fastllm_loads_every_form_and_they_agree(model):
    ids = torch.tensor([[300, 301, 302, 303]])
    exact = fastllm.load(model / "hf", dtype=torch.float32).logits(ids)
    assert exact.isfinite().all() and exact.std() > 0.1
    for form, least in (("q4_0", 0.95), ("q8_0", 0.999)):
        logits = fastllm.load(model / f"{form}.gguf").logits(ids)
        assert torch.nn.functional.cosine_similarity(logits, exact, dim=-1).min() > least


def test_weights_are_counted_as_stored():
    matrices = {name: dims for name, dims in make_models.tensors(TINY) if len(dims) == 2}
    layers = sum(math.prod(dims) for name, dims in matrices.items() if ".layers." in name)
    assert (TINY.layer_weights, TINY.head_weights) == (layers, math.prod(matrices["lm_head.weight"]))


def test_a_model_that_is_there_is_not_made_again(model, monkeypatch):
    monkeypatch.setitem(common.SHAPES, "tiny", TINY)
    monkeypatch.setattr(make_models, "HOME", model.parents[1])
    monkeypatch.setattr(make_models, "draw", None)
    make_models.make("tiny", list(make_models.FORMS))


def test_all_engines_get_the_same_ids():
    work = common.Work(128, 64, batch=3)
    first, again = common.prompt_ids("1b", work), common.prompt_ids("1b", work)
    assert first == again and [len(ids) for ids in first] == [128] * 3
    assert len({tuple(ids) for ids in first}) == 3
    assert max(map(max, common.prompt_ids("135m", work))) < common.SHAPES["135m"].vocab_size


def test_a_job_survives_its_journey():
    job = common.Job("1b", "int8", 2, (common.Work(512), common.Work(100, 64, 4)))
    assert common.Job.parse(job.text()) == job
    assert (job.capacity, job.batch) == (576, 4)


class Clock:
    """An engine that takes 2 s for prompts and 0.5 s a step."""

    weights_bytes = 1

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(common.time, "perf_counter", lambda: self.now)

    def generate(self, prompts, new_tokens, tick):
        self.now += 2.0
        tick()
        for _ in range(new_tokens):
            self.now += 0.5
            tick()
        return [[7] * (new_tokens + 1) for _ in prompts]


def test_rates_count_prompts_or_steps_never_both(monkeypatch):
    engine = Clock(monkeypatch)
    assert common.measure(engine, "1b", common.Work(512))["tok_s"] == 256.0
    assert common.measure(engine, "1b", common.Work(128, 10))["tok_s"] == 2.0
    assert common.measure(engine, "1b", common.Work(128, 10, batch=4))["tok_s"] == 8.0


def test_every_batch_is_warmed_up_before_it_is_timed(monkeypatch):
    engine, seen = Clock(monkeypatch), []
    generate = engine.generate
    monkeypatch.setattr(engine, "generate", lambda p, n, tick: (seen.append((len(p[0]), len(p), n)), generate(p, n, tick))[1])
    works = (common.Work(512), common.Work(128, 64), common.Work(2048, 64), common.Work(128, 64, batch=4))
    answers = list(common.serve(lambda job: engine, common.Job("1b", "q4_0", 2, works), ["0\n", "3\n", "none"]))
    assert seen == [(512, 1, 0), (128, 1, 8), (128, 4, 8), (512, 1, 0), (128, 4, 64)]
    assert answers[0] == {"weights_bytes": 1}
    assert [answer["work"] for answer in answers[1:3]] == ["prefill 512", "decode at 128, batch 4"]
    assert "ValueError" in answers[3]["error"]


def test_time_of_others_is_what_is_busy_and_not_ours():
    assert common.others_share((0, 0, 0.0), (200, 150, 100.0)) == 0.25
    assert common.others_share((0, 0, 0.0), (200, 100, 103.0)) == 0.0


def test_rounds_go_there_and_back_over_all_work_by_work():
    entries = run.entries(["fastllm.q4_0_int8", "llama_cpp"], ["135m", "1b"], ["standard"])
    names = ["q4_0_int8", "q4_0", "q8_0"]
    assert [(turn, entry.shape, entry.variant, work) for turn, entry, work in run.in_turns(entries, 2)] == [
        (turn, shape, name, work)
        for shape in ("135m", "1b")
        for turn, order in ((0, names), (1, names[::-1]))
        for work in (0, 1)
        for name in order
    ]


@pytest.mark.parametrize("name", ["vllm", "llama_cpp.q2_k"])
def test_an_unknown_rival_is_named_beside_the_known_ones(name):
    with pytest.raises(SystemExit, match=f"{name}, expected one of .*llama_cpp"):
        run.entries([name], ["1b"], ["standard"])


def test_every_rival_says_what_it_runs_in_and_reads():
    for entry in run.entries(run.RIVALS, list(common.SHAPES), list(contestants.WORKS)):
        assert entry.details.source in make_models.FORMS
        assert entry.module.ENVIRONMENT in (None, *environments.NAMES)


def answer(rate: float, others: float = 0.0) -> dict:
    measured = {"tok_s": rate, "others_cpu": others, "peak_rss_mib": 100.0, "first_tokens": [1]}
    return {"weights_bytes": 10, "versions": {"engine": "1.0"}, **measured}


def test_a_disturbed_turn_is_repeated_and_the_quietest_kept(monkeypatch):
    monkeypatch.setattr(run, "wait_until_idle", lambda patience: None)
    noise = iter([0.5, 0.01, 0.0])
    machine = iter({"read_memory": float(n)} for n in range(20))
    quiet = run.undisturbed(lambda: answer(1, next(noise)), lambda: next(machine), 1)
    assert quiet["others_cpu"] == 0.01
    assert quiet["machine"] == [{"read_memory": 2.0}, {"read_memory": 3.0}]
    noise = iter([0.5, 0.3, 0.4])
    assert run.undisturbed(lambda: answer(1, next(noise)), lambda: next(machine), 1)["others_cpu"] == 0.3


@pytest.fixture
def played():
    """Two rounds of ours, a faster-decoding rival, and one that fails in its first."""
    rates = {"fastllm": iter([200.0, 30.0, 100.0, 50.0]), "llama_cpp": iter([100.0, 60.0, 100.0, 50.0])}

    def play(entry, work):
        if entry.variant == "q8_0":
            return {"error": "no such thing"}
        return answer(next(rates[entry.rival]))

    saved = []
    entries = run.entries(["fastllm.q4_0_int8", "llama_cpp"], ["1b"], ["standard"])
    records = run.play(entries, 2, play, lambda records: saved.append(len(records)))
    assert saved == [1, 2, 4, *range(5, 11)]  # after each turn: what is broken off is kept; a failure is one of every work
    return records


def test_rows_are_medians_with_ratios_of_the_same_rounds(played):
    rows = {(row["rival"], row["variant"], row["work"]): row for row in report.summarise(played, LIMITS)}
    ours = rows["fastllm", "q4_0_int8", "decode at 128"]
    assert (ours["tok_s"], ours["min"], ours["max"]) == (40, 30, 50)
    assert ours["vs_best"] == (30 / 60 + 50 / 50) / 2
    assert rows["llama.cpp", "q4_0", "decode at 128"]["vs_best"] == 1.0
    assert rows["fastllm", "q4_0_int8", "prefill 512"]["vs_best"] == 1.5
    assert rows["fastllm", "q4_0_int8", "prefill 512"]["vs_best_same_bits"] == 1.5


def test_what_is_measured_again_replaces_what_a_file_has(played):
    llama_cpp = run.entries(["llama_cpp.q4_0"], ["1b"], ["standard"])
    kept = run.others_runs(played, llama_cpp)
    assert [r["rival"] for r in kept] == [r["rival"] for r in played if (r["rival"], r["variant"]) != ("llama.cpp", "q4_0")]
    assert len(kept) < len(played)
    for others in (
        run.entries(["llama_cpp.q4_0"], ["1b"], ["batches"]),
        run.entries(["llama_cpp.q4_0"], ["135m"], ["standard"]),
    ):
        assert run.others_runs(played, others) == played


def test_shares_are_of_the_weights_read_and_multiplied(played):
    shape = common.SHAPES["1b"]
    weights = shape.layer_weights + shape.head_weights
    rows = {row["work"]: row for row in report.summarise(played, LIMITS) if row["rival"] == "fastllm"}
    assert rows["decode at 128"]["share"] == pytest.approx(40 * weights * 18 / 32 / 20e9)
    assert rows["prefill 512"]["share"] == pytest.approx(150 * 2 * (shape.layer_weights + shape.head_weights / 512) / 500e9)


def test_shares_are_of_what_the_machine_gave_then(played):
    for record, bandwidths in zip(
        (r for r in played if r["rival"] == "fastllm" and r["work"] == "decode at 128"), ((8.0, 12.0), (None, 7.0))
    ):
        record["machine"] = [{"read_memory": b, "round_trip": 100.0} for b in bandwidths]
    row = next(r for r in report.summarise(played, LIMITS) if r["work"] == "decode at 128" and r["rival"] == "fastllm")
    shape = common.SHAPES["1b"]
    read = (shape.layer_weights + shape.head_weights) * 18 / 32
    assert row["share"] == pytest.approx((30 * read / 10e9 + 50 * read / 20e9) / 2)  # where nothing was measured, of LIMITS
    assert row["share_of_best"] == pytest.approx(40 * read / 20e9)
    assert row["round_trips"] == [100.0, 100.0]


def test_who_fails_has_a_row_with_the_reason_and_is_asked_once(played):
    failed = [row for row in report.summarise(played, LIMITS) if row["variant"] == "q8_0"]
    assert [row["reason"] for row in failed] == ["no such thing"] * 2
    assert not any("tok_s" in row for row in failed)


def test_tables_fill_a_page_again_and_again(played):
    results = {
        "machine": {"processor": "a CPU"}, "threads": 2, "date": "2026-11-22", "commit": "abc", "limits": LIMITS,
        "rows": report.summarise(played, LIMITS), "runs": played,
    }  # fmt: skip
    results = json.loads(json.dumps(results))
    page = "before\n<!-- rivals -->\nold\n<!-- end of rivals -->\nafter\n"
    filled = report.insert(page, results, "plots")
    assert "old" not in filled and filled.startswith("before\n") and filled.endswith("after\n")
    assert report.insert(filled, results, "plots") == filled
    row = next(line for line in filled.splitlines() if line.startswith("| **fastllm**"))
    assert [cell.strip() for cell in row.split("|")[3:]][:3] == ["150", "100 to 200", "1.50"]
    assert "| 40.0 | 30.0 to 50.0 | 0.75 |" in row
    assert "shape**, medians of 2 interleaved rounds" in filled
    assert "- llama.cpp, Q8_0: no such thing" in filled
    assert "Versions" not in filled and "plots" not in filled
    everything = report.insert(page.replace("rivals -->", "rivals: all -->", 1), results, "plots")
    assert "engine 1.0" in everything and "(plots-1b-standard.png)" in everything


def test_a_rival_that_is_not_installed_is_refused_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "HOME", tmp_path)
    (entry,) = run.entries(["llama_cpp.q4_0"], ["1b"], ["standard"])
    assert entry.refusal() == "not installed: `make rivals` does it"
    environments.folder("llama_cpp").mkdir(parents=True)
    (environments.folder("llama_cpp") / "failed.txt").write_text(common.last_error("Collecting\nERROR: no wheel\nhint"))
    assert entry.refusal() == "not installed: ERROR: no wheel"


# ---------------------------------------------------------------- processes

ENGINE = """
import sys, threading, time
counted = 0
def count():
    global counted
    while True: counted += 1
threading.Thread(target=count, daemon=True).start()
print('{"weights_bytes": 5}', flush=True)
for line in sys.stdin:
    if line == "1\\n": sys.exit("no memory error")
    print('{"tok_s": %d}' % counted, flush=True)
"""


def test_an_engine_loads_once_stands_still_between_turns_and_says_why_it_ended():
    process = contestants.Process([sys.executable, "-c", ENGINE])
    try:
        state = Path(f"/proc/{process.program.pid}/status")
        assert process.about == {"weights_bytes": 5}
        assert process.ask(0)["tok_s"] > 0
        assert "T (stopped)" in state.read_text()  # its spinning thread, too
        assert process.ask(0)["tok_s"] > 0
        assert process.ask(1) == {"error": "ended with status 1: no memory error"}
    finally:
        process.end()
    assert process.program.returncode == 1


def test_a_process_that_dies_at_loading_is_a_reason(monkeypatch):
    monkeypatch.setattr(contestants.environments, "python", lambda name: sys.executable)
    (entry,) = run.entries(["onnxruntime"], ["135m"], ["standard"])  # which is not in this Python
    processes = contestants.Processes(1)
    assert "onnxruntime_genai" in processes.ask(entry, 0)["error"]
    processes.end()


def test_a_new_engine_gets_its_memory_from_those_idle_longest(monkeypatch):
    monkeypatch.setattr(contestants.Entry, "command", lambda self, threads: [sys.executable, "-c", ENGINE])
    first, second, third = run.entries(["fastllm.q4_0_int8", "llama_cpp"], ["1b"], ["standard"])
    monkeypatch.setattr(contestants, "available_memory", lambda: 1 << 40)
    processes = contestants.Processes(1)
    try:
        for entry in (first, second, first):
            assert processes.ask(entry, 0)["weights_bytes"] == 5
        assert list(processes.alive) == [second, first]
        kept = processes.alive[first]
        monkeypatch.setattr(contestants, "available_memory", lambda: third.memory - (second in processes.alive))
        processes.ask(third, 0)
        assert list(processes.alive) == [first, third] and processes.alive[first] is kept
    finally:
        processes.end()
    assert not processes.alive


@pytest.mark.parametrize("weights", gpu_step.WEIGHTS)
def test_the_gpu_benchmarks_model_decodes(weights):
    """Its steps are a GPU's; here they run on the CPU, where one that is all quantised is replayed but for its embedding."""
    shape = common.Shape("tiny", 256, 2, 4, 2, 64, 384, 512, 10000.0, True, max_position_embeddings=64)
    row = gpu_step.measure(shape, weights, "cpu", prompt=5, steps=3)
    assert row["tok_s"] > 0 and 0 < row["weights_gb_s"] < 1e4
    llama = gpu_step.made_up(shape, weights, "cpu")
    logits = llama.head(llama.hidden_states(torch.ones(1, 4, dtype=torch.int64), llama.new_cache(1, 4)))
    assert logits.shape == (1, 4, 512) and bool(logits.isfinite().all())
    assert 0.05 < logits.float().std() < 20
