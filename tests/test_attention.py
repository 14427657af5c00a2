"""What attention promises beyond its cases: either kernel serves, hidden keys stay hidden, gradients, errors in words."""

from __future__ import annotations

import math
import resource

import pytest
import torch
from torch.testing import assert_close

import fastllm
from fastllm.backends import isa_names, use_backend, use_isa
from fastllm.measure.check import check
from fastllm.measure.verify import case_inputs, refusal, to_float64
from fastllm.ops.attention import api, native, reference
from fastllm.ops.attention.cases import CASES, torch_attention
from fastllm.quant import quantize_rows

pytestmark = pytest.mark.skipif(not isa_names(), reason="fastllm._cpu is not built")


def _qkv(B, H, Hk, T, S, D, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, T, H, D, generator=g).to(dtype).transpose(1, 2)
    return q, *(torch.randn(B, Hk, S, D, generator=g).to(dtype) for _ in range(2))


VARIANTS = {
    "causal": {},
    "bidirectional": {"causal": False},
    "window": {"window": 40},
    "softcap": {"softcap": 4.0},
    "sinks": {"sinks": torch.linspace(-1, 2, 6)},
    "lengths": {"kv_lens": torch.tensor([300, 77])},
    "mask": {"mask": torch.arange(300) % 3 > 0},
    "negative scale": {"scale": -0.2},
    "zero scale": {"scale": 0.0, "window": 9},
}


@pytest.mark.parametrize("isa", isa_names())
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", [0, 10**9], ids=["prefill", "decode"])
def test_both_kernels_serve_any_number_of_queries(monkeypatch, isa, variant, rows):
    q, k, v = _qkv(2, 6, 2, 5, 300, 64)
    monkeypatch.setattr(native, "DECODE_ROWS", rows)
    with use_isa(isa):
        o = fastllm.attention(q, k, v, **VARIANTS[variant])
    expected = reference.attention(q.double(), k.double(), v.double(), **VARIANTS[variant])
    verdict = check(o, expected, torch_attention(q, k, v, **VARIANTS[variant]))
    assert verdict.ok, verdict.why


@pytest.mark.parametrize("isa", isa_names())
@pytest.mark.parametrize("T", [1, 40])
def test_queries_that_see_nothing_give_zeros(isa, T):
    q, k, v = _qkv(2, 4, 2, T, 70, 64)
    mask = torch.ones(2, 1, T, 70, dtype=torch.bool)
    mask[0, :, -1] = False
    with use_isa(isa):
        for hidden in (mask, torch.zeros(mask.shape).masked_fill(~mask, -math.inf)):
            o = fastllm.attention(q, k, v, mask=hidden, causal=False)
            assert (o[0, :, -1] == 0).all()
            assert (o[1] != 0).all()
        o = fastllm.attention(q, k, v, kv_lens=torch.tensor([0, 70]), sinks=torch.zeros(4))
        assert (o[0] == 0).all()
        assert (o[1] != 0).any()
        assert (fastllm.attention(q, k[:, :, :0], v[:, :, :0]) == 0).all()


@pytest.mark.parametrize("isa", isa_names())
@pytest.mark.parametrize("T", [1, 30])
def test_keys_beyond_kv_lens_are_never_read(isa, T):
    q, k, v = _qkv(2, 4, 2, T, 300, 64)
    lens = torch.tensor([37, 263])
    for b, n in enumerate(lens):
        k[b, :, n:] = v[b, :, n:] = float("nan")
    with use_isa(isa):
        o = fastllm.attention(q, k, v, kv_lens=lens)
        for b, n in enumerate(lens):
            alone = fastllm.attention(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n])
            assert o[b : b + 1].equal(alone)  # to the bit: nor does the batch matter
    assert reference.attention(q, k, v, kv_lens=lens).isfinite().all()


@pytest.mark.parametrize("isa", isa_names())
def test_prefill_bits_do_not_depend_on_the_other_queries(isa):
    q, k, v = _qkv(1, 4, 2, 150, 150, 64)
    with use_isa(isa):
        whole = fastllm.attention(q, k, v)
        part = fastllm.attention(q[:, :, 40:90], k[:, :, :90], v[:, :, :90])
    assert part.equal(whole[:, :, 40:90])


@pytest.mark.parametrize("isa", isa_names())
@pytest.mark.parametrize("T", [1, 20])
def test_a_nan_reaches_the_rows_that_see_it_and_no_other(isa, T):
    q, k, v = _qkv(1, 2, 1, T, 100, 64)
    mask = torch.zeros(T, 100)
    mask[0, 3] = float("nan")
    with use_isa(isa):
        o = fastllm.attention(q, k, v, mask=mask)
        assert o[:, :, 0].isnan().all()
        assert o[:, :, 1:].isfinite().all()
        k[:, :, 99] = float("nan")
        o = fastllm.attention(q, k, v)
        assert o[:, :, -1].isnan().all()
        assert o[:, :, :-1].isfinite().all()


def test_the_output_is_laid_out_for_the_model_on_every_backend():
    q, k, v = _qkv(2, 4, 2, 3, 9, 16)
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            assert fastllm.attention(q, k, v).transpose(1, 2).is_contiguous()


def test_the_scores_matrix_is_never_made():
    T = 12_000  # its matrix would take 576 MB
    q, k, v = _qkv(1, 1, 1, T, T, 8)
    fastllm.attention(q, k, v, window=64)  # pages of the code and of the workspace
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fastllm.attention(q, k, v, window=64)
    fastllm.attention(q[:, :, :2000], k, v, causal=False)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_the_registered_op_passes_opcheck():
    q, k, v = _qkv(2, 4, 2, 5, 9, 16)
    arguments = [
        api._prepare(q, k, v),
        api._prepare(q, k, v, False, window=3, softcap=2.0, mask=torch.ones(5, 9).bool(), sinks=torch.zeros(4)),
        api._prepare(q[:, :, :1], k, v, kv_lens=torch.tensor([9, 4]), mask=torch.zeros(9)),
        api._prepare(*(x.detach().requires_grad_() for x in (q, k, v))),
    ]
    for args in arguments:
        torch.library.opcheck(torch.ops.fastllm.attention.default, args)


GRADIENTS = {
    "causal": {},
    "cross": {"causal": False, "scale": 0.3},
    "window, softcap, lengths": {"window": 7, "softcap": 1.5, "kv_lens": torch.tensor([20, 11])},
    "mask": {"mask": "float"},
    "boolean mask": {"mask": torch.arange(20) % 3 == 0},
    "sinks": {"sinks": "float"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", GRADIENTS)
def test_gradients(variant, dtype):
    q, k, v = _qkv(2, 4, 2, 10, 20, 16, dtype)
    g = torch.Generator().manual_seed(1)
    options = dict(GRADIENTS[variant])
    for name, shape in (("mask", (4, 1, 20)), ("sinks", (4,))):
        if isinstance(options.get(name), str):
            options[name] = torch.randn(shape, generator=g).to(dtype)
    do = torch.randn(2, 4, 10, 16, generator=g).to(dtype)

    def gradients(call, wide):
        convert = (lambda x: x.double()) if wide else (lambda x: x.clone())
        leaves = {"q": q, "k": k, "v": v}
        leaves |= {n: x for n, x in options.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
        leaves = {n: convert(x).detach().requires_grad_() for n, x in leaves.items()}
        call(**{**options, **leaves}).backward(convert(do))
        return {n: x.grad for n, x in leaves.items()}

    ours, expected, theirs = (
        gradients(fastllm.attention, False),
        gradients(reference.attention, True),
        gradients(torch_attention, False),
    )
    for name, grad in ours.items():
        verdict = check(grad, expected[name], theirs[name], factor=3.0)
        assert verdict.ok, f"{name}: {verdict.why}"


def _pooled(int8=False, dtype=torch.float32, T=1):
    """Two sequences of 37 and 20 tokens in pages of 16 of a pool of 8, in no order."""
    q, _, _ = _qkv(2, 4, 2, T, 1, 16, dtype)
    _, k, v = _qkv(8, 4, 2, 1, 16, 16, dtype)
    options = {"kv_lens": torch.tensor([37, 20]), "block_table": torch.tensor([[5, 0, 7, -1], [2, 6, 99, 1 << 30]])}
    if int8:
        (k, options["k_scale"]), (v, options["v_scale"]) = quantize_rows(k), quantize_rows(v)
    return {"q": q, "k": k, "v": v, **options}


def test_the_cpu_kernels_refuse_pages_and_no_other_case():
    for case in CASES.cases:
        if case.bench:
            continue
        inputs = case_inputs(CASES, case)
        why = refusal(CASES, inputs, "cpu")
        assert (why is None) == ("block_table" not in inputs), f"{case.name}: {why}"
        assert why is None or "not in pages" in why


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("T", [1, 5])
def test_a_key_is_where_the_table_says(int8, T):
    inputs = _pooled(int8, T=T)
    table, page = inputs["block_table"], inputs["k"].shape[2]

    def key(name, b, s):
        at = (int(table[b, s // page]), slice(None), s % page)
        return inputs[name][at].double() * (inputs[f"{name}_scale"][at].double()[:, None] if int8 else 1.0)

    o = reference.attention(**{name: to_float64(x) for name, x in inputs.items()})
    assert_close(fastllm.attention(**inputs), o.float())
    for b, n in enumerate(inputs["kv_lens"].tolist()):
        k, v = (torch.stack([key(name, b, s) for s in range(n)], 1)[None] for name in "kv")
        assert_close(o[b : b + 1], reference.attention(inputs["q"][b : b + 1].double(), k, v))


@pytest.mark.parametrize("int8", [False, True])
def test_a_cache_in_pages_or_int8_passes_opcheck_and_compiles(int8):
    inputs = _pooled(int8)
    torch.library.opcheck(torch.ops.fastllm.attention.default, api._prepare(**inputs))
    compiled = torch.compile(lambda inputs: fastllm.attention(**inputs) * 2, fullgraph=True, backend="aot_eager")
    assert_close(compiled(inputs), fastllm.attention(**inputs) * 2)


@pytest.mark.parametrize("int8", [False, True])
def test_a_cache_in_pages_or_int8_has_no_gradient_but_the_references(int8):
    inputs = _pooled(int8)
    inputs["q"].requires_grad_()
    with pytest.raises(NotImplementedError, match="attention: no gradient, because a cache in pages or in int8"):
        fastllm.attention(**inputs).sum().backward()
    with use_backend("reference"):
        fastllm.attention(**inputs).square().sum().backward()
    assert (inputs["q"].grad != 0).any()


def test_int8_rows_are_within_half_a_step():
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-9, 1.0, 3e4])[:, None, None]
    x[0, 0] = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        q, scale = quantize_rows(x.to(dtype))
        assert q.dtype == torch.int8
        assert q.abs().amax(-1).flatten()[1:].eq(127).all()
        error = (q.double() * scale.double()[..., None] - x.to(dtype).double()).abs()
        assert (error <= scale.double()[..., None] * (0.5 + 127 * 2.0**-22)).all()  # the quotient is rounded to fp32 first
    x[1, 2, 3], x[2, 1, 0] = math.nan, math.inf
    assert quantize_rows(x)[1].isnan().nonzero().tolist() == [[1, 2], [2, 1]]


def test_compiles():
    q, k, v = _qkv(1, 4, 2, 6, 9, 16)
    compiled = torch.compile(lambda q, k, v: fastllm.attention(q, k, v, window=4) * 2, fullgraph=True, backend="aot_eager")
    assert_close(compiled(q, k, v), fastllm.attention(q, k, v, window=4) * 2)


def _bad():
    q, k, v = _qkv(2, 4, 2, 3, 8, 16)
    lens = torch.tensor([8, 8])
    return {
        "q is no tensor": ({"q": [1.0]}, TypeError, "attention: q is a list, expected a torch.Tensor"),
        "q int": ({"q": q.long()}, TypeError, "attention: q has dtype torch.int64, expected"),
        "q 3 dims": ({"q": q[0]}, ValueError, r"attention: q has shape \(4, 3, 16\), expected \(B, H, T, D\)"),
        "k dtype": ({"k": k.double()}, TypeError, "attention: k has dtype torch.float64, expected torch.float32"),
        "k narrower than q's half": (
            {"q": q.half(), "k": k.bfloat16(), "v": v.bfloat16()},
            TypeError,
            "attention: k has dtype torch.bfloat16, expected torch.float16",
        ),
        "v dtype": ({"k": k.half()}, TypeError, "attention: v has dtype torch.float32, expected torch.float16 to match k"),
        "k batch": ({"k": k[:1]}, ValueError, r"attention: k has shape \(1, 2, 8, 16\), expected \(2, Hk, S, 16\)"),
        "k heads": ({"k": k[:, :1].expand(2, 3, 8, 16)}, ValueError, "a number of heads that divides 4"),
        "k no heads": ({"k": k[:, :0]}, ValueError, "a number of heads that divides 4"),
        "v shape": ({"v": v[:, :, :7]}, ValueError, r"attention: v has shape .*, expected \(2, 2, 8, 16\)"),
        "causal": ({"causal": torch.ones(3, 8)}, TypeError, "attention: causal is a Tensor, expected True or False"),
        "scale": ({"scale": math.nan}, ValueError, "attention: scale is nan, expected a finite number"),
        "window 0": ({"window": 0}, ValueError, "attention: window is 0, expected at least 1 token"),
        "softcap": ({"softcap": -1.0}, ValueError, "attention: softcap is -1.0, expected a finite number above 0"),
        "mask dtype": ({"mask": torch.ones(3, 8).long()}, TypeError, "attention: mask has dtype torch.int64"),
        "mask shape": ({"mask": torch.ones(2, 3, 8)}, ValueError, r"expected a shape that broadcasts to \(2, 4, 3, 8\)"),
        "mask 5 dims": ({"mask": torch.ones(1, 1, 1, 3, 8)}, ValueError, "expected a shape that broadcasts"),
        "kv_lens dtype": ({"kv_lens": lens.float()}, TypeError, "attention: kv_lens has dtype torch.float32"),
        "kv_lens shape": ({"kv_lens": lens[:1]}, ValueError, r"attention: kv_lens has shape \(1,\), expected \(2,\)"),
        "kv_lens range": ({"kv_lens": lens + 1}, ValueError, r"attention: kv_lens\[0\] is 9, expected 0 to 8"),
        "kv_lens negative": ({"kv_lens": -lens}, ValueError, r"attention: kv_lens\[0\] is -8, expected 0 to 8"),
        "sinks shape": ({"sinks": torch.ones(2)}, ValueError, r"attention: sinks has shape \(2,\), expected \(4,\)"),
        "sinks dtype": ({"sinks": torch.ones(4).half()}, TypeError, "attention: sinks has dtype torch.float16"),
    }


@pytest.mark.parametrize("name", _bad())
def test_bad_input_is_refused_in_words(name):
    q, k, v = _qkv(2, 4, 2, 3, 8, 16)
    wrong, kind, text = _bad()[name]
    with pytest.raises(kind, match=text):
        fastllm.attention(**{"q": q, "k": k, "v": v, **wrong})


def test_heads_whose_last_dim_is_strided_go_to_the_reference():
    q, k, v = _qkv(1, 2, 2, 3, 8, 16)
    wide = torch.stack([k, k], -1).flatten(-2)[..., ::2]  # stride 2
    assert_close(fastllm.attention(q, wide, v), fastllm.attention(q, k, v))
    with use_backend("cpu"), pytest.raises(NotImplementedError, match="stride 1; k has stride 2"):
        fastllm.attention(q, wide, v)
