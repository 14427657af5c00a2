"""The Triton kernels: every op's cases in Triton's interpreter (or on a GPU), wrong kernels, and kernels compiled for GPUs.

TRITON_INTERPRET=1 pytest tests/test_triton.py     # what `make test` runs where there is no GPU
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_int8_activations import WRITERS, differs

import fastllm
from fastllm.measure.check import check
from fastllm.measure.poison import poisoned as poisoned_outputs
from fastllm.measure.verify import all_cases, case_inputs, device_of, forced, refusal, run_case, to_device, too_slow
from fastllm.ops._triton import interpreting
from fastllm.quant import quantize_rows

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not (interpreting() or torch.cuda.is_available()), reason="TRITON_INTERPRET=1 pytest tests/test_triton.py runs it"
)

OPS = Path(fastllm.__file__).parent / "ops"
CASES = [
    pytest.param(spec, case, backend, id=f"{spec.op}-{case.name}-{case.dtype}" + ("-torch" if backend == "torch" else ""))
    for spec in all_cases().values()
    for case in spec.cases
    # "torch" writes a quantised weight out and hands the product to PyTorch; it takes no int8 activations.
    for backend in (("triton", "torch") if spec.op == "quant_matmul" and "float" in case.name else ("triton",))
    if not too_slow(case, None, "triton")
]


@pytest.mark.parametrize(("spec", "case", "backend"), CASES)
def test_triton_kernel_is_within_the_rule(spec, case, backend, poisoned):
    device = device_of(backend)
    with forced(backend):
        why = refusal(spec, to_device(case_inputs(spec, case), device), backend)
        if why is not None:
            pytest.skip(why)
        verdict = run_case(spec, case, device=device)
    assert verdict.ok, verdict.why
    poisoned.check()


@pytest.mark.parametrize(("spec", "case", "backend"), [p for p in CASES if p.values[0].op in WRITERS])
def test_int8_outputs_are_the_result_rounded(spec, case, backend):
    with forced(backend):
        assert not differs(spec, to_device(case_inputs(spec, case), device_of(backend)))


# op's folder -> (what is wrong, the kernel's line, the wrong line)
WRONG = [
    ("rms_norm", "no eps", "/ K + eps", "/ K"),
    ("rms_norm", "the residual is not added", "(h.to(tl.float32) + tl.load(r_ptr", "(0.0 * tl.load(r_ptr"),
    ("rms_norm", "the last element of a row is left out", "mask = inside & (k < K)", "mask = inside & (k < K - 1)"),
    (
        "rms_norm",
        "int8: every row is the first",
        "store_int8_groups(y_ptr, groups_ptr, row,",
        "store_int8_groups(y_ptr, groups_ptr, 0 * row,",
    ),
    (
        "rms_norm",
        "int8: a long row's parts go where its first went",
        "_store_int8(y_ptr, groups_ptr, row, start,",
        "_store_int8(y_ptr, groups_ptr, row, 0 * start,",
    ),
    ("rms_norm", "int8: of what was not rounded to the dtype", "y.to(DTYPE).to(tl.float32)", "y"),
    (
        "gated_activation",
        "int8: every block is a row's first",
        "groups_ptr, whole, first, y,",
        "groups_ptr, whole, 0 * first, y,",
    ),
    ("gated_activation", "silu for gelu", "if GELU_TANH else x", "if False else x"),
    ("gated_activation", "up is not multiplied", "* u.to(tl.float32)", "+ 0.0 * u.to(tl.float32)"),
    ("rotary", "sine's sign", "a * cos_a - b * sin_a", "a * cos_a + b * sin_a"),
    ("rotary", "halves for neighbours", "lane_b = 2 * pair + 1 if", "lane_b = 2 * pair + 2 if"),
    ("rotary", "the rest of the lanes is not copied", "if BLOCK_REST > 0:", "if BLOCK_REST < 0:"),
    ("attention", "a query does not see itself", "key <= position", "key < position"),
    ("attention", "the window is off by one", "tl.abs(position - key) < window", "tl.abs(position - key) <= window"),
    (
        "attention",
        "the running sum is not corrected",
        "total = total * correction + tl.sum(p, 1)",
        "total = total + tl.sum(p, 1)",
    ),
    ("attention", "sinks are left out", "if HAS_SINKS:", "if False:"),
    ("attention", "kv_lens are not looked at", "if HAS_LENS:", "if False:"),
    ("attention", "the softcap is left out", "z = softcap * tanh(z * factor, q.dtype == tl.float32)", "z = z * factor"),
    ("attention", "the table is not looked at", "page = tl.load(", "page = start // PAGE + 0 * tl.load("),
    ("attention", "a page's first rows for all", "tl.cast(start % PAGE, tl.int64) * stride", "tl.cast(0, tl.int64) * stride"),
    (
        "attention",
        "a page's row is off by one",
        "((start + n) % PAGE).to(tl.int64) * stride + d",
        "((start + n + 1) % PAGE) * stride + d",
    ),
    (
        "attention",
        "a page's scale is off by one",
        "((start + n) % PAGE).to(tl.int64) * stride\n",
        "((start + n + 1) % PAGE) * stride\n",
    ),
    ("attention", "k's scale is left out", "z *= _scales(", "z += 0.0 * _scales("),
    ("attention", "v's scale is k's", "_scales(v_scale_ptr,", "_scales(k_scale_ptr,"),
    (
        "attention",
        "v's scale is the next token's",
        "p *= (scale",
        "n = tl.arange(0, BLOCK_N)\n        p *= (tl.gather(scale, (n + 1) % BLOCK_N, 0)",
    ),
    ("attention", "weights of int8 stay 64 times too large", "acc *= 1.0 / 64.0", "acc *= 1.0"),
    ("attention", "fp16 loses small weights of int8", "(scale * 64.0)", "(scale * 0.015625)"),
    ("quant_matmul", "no minimum", "tl.fma(q, scale, minimum) if HAS_MINIMUM else q * scale", "q * scale"),
    (
        "quant_matmul",
        "zero is not subtracted",
        "quantized_column(dwords, zero, c, BITS)",
        "quantized_column(dwords, 0, c, BITS)",
    ),
    (
        "quant_matmul",
        "int8: x's first scale for all of its groups",
        "tl.load(x_groups + step * 2, mask",
        "tl.load(x_groups + 0 * step, mask",
    ),
    ("quant_matmul", "int8: the sum of integers is not scaled", "x_sum = x_scale * tl.load(", "x_sum = tl.load("),
    (
        "quant_matmul",
        "int8: given rows lie one behind the other",
        "steps, float(zero), each, at.s2,",
        "steps, float(zero), each, K,",
    ),
    ("quant_matmul", "int8: the first group's scale for all", "group = step // GROUP_STEPS * 16", "group = 0 * GROUP_STEPS"),
    (
        "quant_matmul",
        "written out: columns in another order",
        "tl.join(w0, w2), tl.join(w1, w3)",
        "tl.join(w0, w1), tl.join(w2, w3)",
    ),
    ("quant_matmul", "the bias is left out", "        acc += tl.load(bias_ptr", "        acc += 0 * tl.load(bias_ptr"),
    ("rotary", "the cache's slot is off by one", "slot = tl.load(slot_ptr", "slot = 1 + tl.load(slot_ptr"),
    ("cross_entropy", "tokens past the last are in the sum", 'z = tl.where((v < end)[None, :], z, float("-inf"))', "z = z"),
    (
        "cross_entropy",
        "the running sum is not corrected",
        "total = total * tl.exp(top - new) + tl.sum(tl.exp(z",
        "total = total + tl.sum(tl.exp(z",
    ),
    ("cross_entropy", "the parts' sums are not corrected", "totals * tl.exp(tops - new[None, :])", "totals"),
    ("cross_entropy", "the softcap is left out", "z = softcap * tanh(z / softcap, PRECISE)", "z = z"),
    (
        "cross_entropy",
        "the next token is picked",
        "tl.where(v[None, :] == target[:, None], z, 0.0)",
        "tl.where(v[None, :] == target[:, None] + 1, z, 0.0)",
    ),
    ("cross_entropy", "nothing is ignored", "tl.where(ignored, 0.0, loss)", "loss"),
    (
        "cross_entropy",
        "the last columns of hidden are left out",
        "for k0 in range(0, K, BLOCK_K):",
        "for k0 in range(0, K - 1, BLOCK_K):",
    ),
    (
        "cross_entropy",
        "a part takes the next one's tokens too",
        "end = tl.minimum(first + split_tokens, V)",
        "end = tl.minimum(first + 2 * split_tokens, V)",
    ),
    (
        "cross_entropy",
        "a quantised head: columns past the last are read",
        "tl.load(z_ptr + row * columns + v, mask=v < end, other=0.0)",
        "tl.load(z_ptr + row * PART + v, mask=v < end, other=0.0)",
    ),
]


def mutant(folder, old, new, path):
    """The op's triton.py with one line changed, imported from a file of its own, which the interpreter reads."""
    source = (OPS / folder / "triton.py").read_text(encoding="utf-8")
    assert source.count(old) >= 1, f"{folder}/triton.py no longer says {old!r}"
    file = path / "wrong.py"
    file.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"fastllm.ops.{folder}.triton", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("folder", "what", "old", "new"), WRONG, ids=[f"{w[0]}-{w[1]}" for w in WRONG])
def test_a_wrong_kernel_fails(folder, what, old, new, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, f"fastllm.ops.{folder}.triton", mutant(folder, old, new, tmp_path))
    for spec, case, backend in sorted((p.values for p in CASES), key=lambda one: (one[1].flops, one[1].bytes)):
        if importlib.import_module(spec.call.__module__).__package__ != f"fastllm.ops.{folder}":
            continue
        with forced(backend), poisoned_outputs() as memory:
            verdict = run_case(spec, case, device=device_of(backend))
            if not verdict.ok or memory.overrun():
                return
            if spec.op in WRITERS and differs(spec, to_device(case_inputs(spec, case), device_of(backend))):
                return
    pytest.fail(f"no case of {folder} notices: {what}")


@pytest.mark.parametrize("page", [16, 20, 64])
@pytest.mark.parametrize("T", [1, 20])
@pytest.mark.skipif(not interpreting(), reason="on a GPU, sums over another number of warps are other sums")
def test_attention_over_pages_gives_the_bits_of_one_piece(page, T):
    from fastllm.ops.attention import reference

    spec = all_cases()["attention"]
    g = torch.Generator().manual_seed(page + T)
    q = torch.randn(2, 4, T, 64, generator=g)
    pools = {name: torch.randn(12, 2, page, 64, generator=g) for name in "kv"}
    quantized = {name: quantize_rows(pool) for name, pool in pools.items()}
    table, kv_lens = torch.randperm(12, generator=g).view(2, 6), torch.tensor([5 * page + 3, page])
    table[1, 1:] = torch.tensor([-1, 1 << 40, 12, -(1 << 40), 99])  # nobody's: not looked at
    for cache in (
        pools,
        {name: x for name in "kv" for name, x in zip((name, f"{name}_scale"), quantized[name])},
    ):
        whole = {name: reference.whole(x, None, table, kv_lens) for name, x in cache.items()}
        with forced("triton"):
            y, expected = (
                spec.call(**to_device({"q": q, "kv_lens": kv_lens, **both}, device_of("triton")))
                for both in ({**cache, "block_table": table}, whole)
            )
        assert y.equal(expected)


def test_without_the_interpreter_the_reason_is_given(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("CUDA tensors are served here")
    monkeypatch.delenv("TRITON_INTERPRET")
    x = torch.ones(2, 8)
    with fastllm.use_backend("triton"), pytest.raises(NotImplementedError, match="it takes CUDA tensors, not cpu"):
        fastllm.rms_norm(x, None)


def test_a_cuda_tensor_described_by_its_shape_is_explained():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(4, 4096, device="cuda", dtype=torch.bfloat16)
        found = fastllm.explain("rms_norm", x, torch.empty(4096, device="cuda", dtype=torch.bfloat16))
    assert found.backend == "triton"
    assert "it takes CPU tensors, not cuda" in str(found)


def test_kernels_compile_for_gpus_that_are_not_here():
    """One target of each kind; `make compile` does all launches for all targets."""
    command = [sys.executable, "-m", "fastllm", "compile", "--op", "gated_activation", "--target", "sm_90,gfx942"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=OPS.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_a_quantised_head_s_logits_come_in_stretches(activations, monkeypatch):
    """So long a vocabulary takes an interpreter minutes: the stretches are made short instead."""
    from fastllm.ops.cross_entropy import triton as kernels

    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 32, generator=g), fastllm.quantize(torch.randn(300, 32, generator=g), 8, 32)
    target = torch.tensor([0, 63, 64, 299, -100])
    monkeypatch.setattr(kernels, "PART", 64)
    monkeypatch.setattr(kernels, "BLOCK", 32)
    arguments = [t.to(device_of("triton")) for t in (hidden, weight, target)]
    with fastllm.use_backend("triton"):
        whole = fastllm.cross_entropy(*arguments, activations=activations)
        monkeypatch.setattr(kernels, "ROWS", 2)
        monkeypatch.setattr(kernels, "TILE", 2 * 128)
        parts = fastllm.cross_entropy(*arguments, activations=activations)
    spec = all_cases()["cross_entropy"]
    r = spec.reference(hidden.double(), weight, target, activations=activations)
    p = spec.torch(hidden, weight, target, activations=activations)
    for loss in (whole, parts):
        verdict = check(loss.cpu(), r, p)
        assert verdict.ok, verdict.why


def test_a_target_that_is_no_token_is_answered_with_nan():
    hidden, weight = (torch.ones(4, 8, device=device_of("triton")) for _ in range(2))
    target = torch.tensor([0, 4, -1, -100], device=device_of("triton"))
    for w in (weight, fastllm.quantize(weight, 8, -1)):
        with fastllm.use_backend("triton"):
            loss = fastllm.cross_entropy(hidden, w, target).cpu()
        assert loss.isnan().tolist() == [False, True, True, False]
        assert loss[3] == 0


def test_infinite_logits():
    """Of +inf PyTorch makes NaN, so that no rule can tell: the likelihood of any other token is 0, and the loss +inf."""
    hidden, weight = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]), torch.tensor([[0.0], [torch.inf], [2.0]])
    arguments = [t.to(device_of("triton")) for t in (hidden, weight, torch.tensor([0, 1, 2, 1]))]
    with fastllm.use_backend("triton"):
        loss = fastllm.cross_entropy(*arguments).cpu()
    assert loss[0] == loss[3] == torch.inf
    assert loss[1].isnan()
    assert loss[2].isfinite()
