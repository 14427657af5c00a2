"""The main job, end to end on the real model: what the demo's JSON says must hold on any machine, however slow."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fastllm.backends import cpu_module

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def demo(real_path, tmp_path_factory):
    if cpu_module() is not None and cpu_module().active_isa() == "scalar":
        pytest.skip("takes the scalar rung a quarter of an hour; test_models runs it on the same model")
    file = tmp_path_factory.mktemp("demo") / "demo.json"
    command = [sys.executable, "-m", "fastllm", "demo", "--model", str(real_path), "--rounds", "1", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text(encoding="utf-8")), done.stdout


def test_perplexity_stays(demo):
    results, _ = demo
    fp32 = results["baseline"]["perplexity"]
    assert abs(results["fastllm_float"]["perplexity"] / fp32 - 1) < 0.005
    assert abs(results["fastllm"]["perplexity"] / fp32 - 1) < 0.015


def test_no_clear_choice_changes(demo):
    results, _ = demo
    for mode in ("fastllm", "fastllm_float"):
        agreement = results[mode]["agreement"]
        assert agreement["clear"] > 500
        assert agreement["top1_clear"] == 1.0
    assert results["agreement"] == results["fastllm"]["agreement"]
    assert results["fastllm_float"]["agreement"]["mean_kl"] < 1e-8


def test_memory_is_less_than_half(demo):
    results, _ = demo
    assert 0 < results["fastllm"]["peak_rss_mib"] < results["baseline"]["peak_rss_mib"] / 2


def test_every_figure_is_there_and_the_table_shows_it(demo):
    results, shown = demo
    for key in ("baseline", "fastllm"):
        for figure in ("load_s", "prefill_tok_s", "decode_tok_s", "peak_rss_mib", "perplexity"):
            assert results[key][figure] > 0
    assert f"{results['fastllm']['perplexity']:.3f}" in shown
    assert {"attention_decode", "attention_prefill", "embedding", "rms_norm", "rotary"} < set(results["kernels"])
