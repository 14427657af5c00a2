"""fastllm.accelerate inside transformers: same logits, same tokens, exact undo, nobody else touched, refusals in words."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import subprocess
import sys
import weakref

import pytest
import torch

import fastllm
from fastllm.integrations.quant_linear import QuantLinear
from fastllm.measure.check import check
from fastllm.quant import quantize

transformers = pytest.importorskip("transformers")
from transformers import DynamicCache, StaticCache  # noqa: E402

from fastllm.integrations import _hf_attention, _hf_layers  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    """These models are far too small for more, and on a busy machine threads that wait for each other cost minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
KINDS = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3 scaling": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral window": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen2 one window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {}),
    "tied gelu": ("Llama", {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}),
}
FEW = ("llama", "mistral window", "qwen2 one window", "qwen3")


def build(kind="llama", dtype=torch.float32, **changes):
    name, own = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **own, **changes})
    torch.manual_seed(3)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # transformers makes biases 0 and norms 1, which would hide mistakes
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.to(dtype)


def quiet(model, **options):
    return fastllm.accelerate(model, verbose=False, **options)


IDS = torch.randint(2, SIZES["vocab_size"], (2, 21), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones_like(IDS)
LEFT[0, :6] = 0
RIGHT = LEFT.flip(1)


def logits(model, **inputs):
    with torch.no_grad():
        return model(IDS, **inputs).logits


# ---------------------------------------------------------------- the same logits

# Each is a way to call a model; rows of padding mean nothing and are dropped.


def plain(model):
    return logits(model)


def left_padded(model):
    return logits(model, attention_mask=LEFT)[LEFT.bool()]


def right_padded(model):
    return logits(model, attention_mask=RIGHT)[RIGHT.bool()]


def own_mask(model, additive=False):
    allowed = torch.ones(21, 21).tril().bool() & (torch.arange(21) % 5 != 3)
    allowed.fill_diagonal_(True)
    mask = allowed.expand(2, 1, 21, 21)
    if additive:
        mask = torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    if model.config.model_type.startswith("qwen2"):
        mask = dict.fromkeys(("full_attention", "sliding_attention"), mask)
    return logits(model, attention_mask=mask)


def own_additive_mask(model):
    return own_mask(model, additive=True)


def in_pieces(model, cache=None, mask=None):
    cache = DynamicCache(config=model.config) if cache is None else cache
    pieces, start = [], 0
    for length in (5, 9, 1, 1, 5):
        end = start + length
        seen = None if mask is None else mask[:, :end]
        with torch.no_grad():
            pieces.append(model(IDS[:, start:end], attention_mask=seen, past_key_values=cache).logits)
        start = end
    return torch.cat(pieces, 1)


def padded_in_pieces(model):
    return in_pieces(model, mask=LEFT)[LEFT.bool()]


def static_in_pieces(model):
    return in_pieces(model, StaticCache(config=model.config, max_cache_len=40))


def static_padded_in_pieces(model):
    return in_pieces(model, StaticCache(config=model.config, max_cache_len=40), LEFT)[LEFT.bool()]


def packed(model):
    positions = torch.cat([torch.arange(9), torch.arange(12)])[None].expand(2, -1)
    return logits(model, position_ids=positions, use_cache=False)


CALLS = [
    plain,
    left_padded,
    right_padded,
    own_mask,
    own_additive_mask,
    in_pieces,
    padded_in_pieces,
    static_in_pieces,
    static_padded_in_pieces,
    packed,
]


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((k, torch.float32) for k in KINDS), *((k, torch.bfloat16) for k in FEW)], ids=str
)
def test_logits_are_within_the_rule(kind, dtype):
    model = build(kind, dtype)
    exact = copy.deepcopy(model).double()
    wanted = [(call, call(exact), call(model)) for call in CALLS]
    quiet(model)
    for call, r, p in wanted:
        y = call(model)
        assert not y.equal(p), f"{call.__name__}: nothing was swapped"
        verdict = check(y, r, p)
        assert verdict.ok, f"{call.__name__}: {verdict.why}"


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_tokens_are_the_same(kind, cache):
    model = build(kind)
    options = {"max_new_tokens": 16, "do_sample": False, "cache_implementation": cache}
    wanted = [model.generate(IDS, **options), model.generate(IDS, attention_mask=LEFT, **options)]
    beams = model.generate(IDS, num_beams=3, max_new_tokens=6, do_sample=False)
    quiet(model)
    assert model.generate(IDS, **options).equal(wanted[0])
    assert model.generate(IDS, attention_mask=LEFT, **options).equal(wanted[1])
    assert model.generate(IDS, num_beams=3, max_new_tokens=6, do_sample=False).equal(beams)


def test_the_mask_is_never_larger_than_a_row_of_keys(monkeypatch):
    """Causal, window and padding are said in B x S bytes at most: T x S booleans only where a caller brings them."""
    seen = []

    def spy(*args, **kwargs):
        mask = _hf_attention.attention_mask(*args, **kwargs)
        seen.append((mask, kwargs["batch_size"], kwargs["kv_length"]))
        return mask

    monkeypatch.setattr(_hf_attention, "register", lambda: None)
    for kind in FEW:
        model = build(kind)
        quiet(model)
        registry = _hf_attention.ALL_MASK_ATTENTION_FUNCTIONS
        monkeypatch.setitem(registry._global_mapping, "fastllm", spy)
        for call in (plain, left_padded, right_padded, in_pieces, padded_in_pieces, static_in_pieces):
            call(model)
        registry.register("fastllm", _hf_attention.attention_mask)
    assert len(seen) > 50
    for mask, batch, keys in seen:
        assert mask is None or mask.numel() <= batch * keys
    assert {None, torch.uint8, torch.int64} <= {None if mask is None else mask.dtype for mask, *_ in seen}


def test_autocast_and_another_dtype_afterwards():
    model = build("llama")
    exact = copy.deepcopy(model).double()

    def cast(m):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return logits(m, attention_mask=LEFT)[LEFT.bool()]

    r, p = left_padded(exact), cast(model)
    quiet(model)
    verdict = check(cast(model), r, p)
    assert verdict.ok, verdict.why
    model.double()
    assert left_padded(model).equal(r)


# ---------------------------------------------------------------- weights


def dequantised(model, bits, group_of, skip=()):
    """A copy of the model with the weights that the quantised layers stand for."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and name not in skip:
            w = quantize(module.weight, bits, group_of(module.in_features)).dequantize(torch.float64)
            module.weight = torch.nn.Parameter(w.to(module.weight.dtype))
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen2", "tied gelu"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("head", [False, True])
def test_quantised_layers_compute_with_the_stored_weights(kind, weights, head):
    model = build(kind)
    bits, skip = (8 if weights == "int8" else 4), () if head else ("lm_head",)
    group_of = (lambda K: 32) if bits == 4 else {128: 128, 192: 64, 256: 128}.__getitem__
    stand_in = dequantised(model, bits, group_of, skip)
    before = logits(model)
    p, r = left_padded(stand_in), left_padded(stand_in.double())
    report = quiet(model, weights=weights, head=head)
    verdict = check(left_padded(model), r, p)
    assert verdict.ok, verdict.why
    assert report.counts["linear"] == 14 + head
    assert isinstance(model.lm_head, QuantLinear) is head
    report.undo()
    assert logits(model).equal(before)
    if kind == "tied gelu":
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_group_that_does_not_fit_gives_way_and_says_so():
    model = build("llama", hidden_size=96, intermediate_size=80)
    report = quiet(model, weights="int4", group_size=64)
    by = {swap.module: swap.by for swap in report.swapped if swap.kind == "linear"}
    assert "groups of 64" in by["model.layers.0.self_attn.o_proj"]
    assert "groups of 32" in by["model.layers.0.self_attn.q_proj"]
    assert "K = 96 is not divisible by 64" in by["model.layers.0.self_attn.q_proj"]
    assert {left.module: left.why for left in report.left}["model.layers.0.mlp.down_proj"].startswith("its K = 80")
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert logits(model).isfinite().all()


def test_float_weights_can_be_let_go():
    model = build()
    weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    report = quiet(model, weights="int8", keep_originals=False)
    gc.collect()
    assert weight() is None
    after = logits(model)
    with pytest.raises(RuntimeError, match=r"undo: the float weights of 14 Linear layers are gone"):
        report.undo()
    assert logits(model).equal(after)
    assert report.active
    del report

    model = build()
    weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    report = quiet(model, weights="int8")
    gc.collect()
    assert weight() is not None
    del report
    gc.collect()
    assert weight() is None


def test_quantised_layers_move_and_refuse_to_be_saved():
    model = build("qwen2")
    quiet(model, weights="int4")
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 128)
    with torch.no_grad():
        y = layer(x)
        assert copy.deepcopy(layer)(x).equal(y)
        verdict = check(layer.bfloat16()(x.bfloat16()), y.double(), y.bfloat16(), factor=3)
        assert verdict.error <= 0.05 * float(y.abs().max())
    layer.to("meta")
    assert layer.quantized.data.is_meta
    with pytest.raises(NotImplementedError, match=r"state_dict: model.layers.0.self_attn.q_proj is a quantised Linear"):
        model.state_dict()


# ---------------------------------------------------------------- undo, and nobody else


@pytest.mark.parametrize("weights", [None, "int4"])
@pytest.mark.parametrize("kind", FEW)
def test_undo_restores_everything(kind, weights):
    model = build(kind)
    config, before, keys = model.config, logits(model), list(model.state_dict())
    modules, parameters = list(model.modules()), list(model.parameters())
    attributes = [dict(module.__dict__) for module in modules]
    report = quiet(model, weights=weights, head=weights is not None)
    assert not logits(model).equal(before)
    if weights is None:
        assert list(model.state_dict()) == keys
    report.undo()
    report.undo()
    assert "(undone)" in str(report)
    assert logits(model).equal(before)
    assert model.config is config
    assert config._attn_implementation == "sdpa"
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for module, old in zip(modules, attributes):
        assert module.__dict__.keys() == old.keys()
        assert "forward" not in module.__dict__
    quiet(model).undo()


def test_undo_restores_the_attention_that_was_asked_for_and_keeps_new_settings():
    model = build()
    model.set_attn_implementation("eager")
    report = quiet(model)
    assert model.config._attn_implementation == "fastllm"
    model.config.use_cache = False
    report.undo()
    assert model.config._attn_implementation == "eager"
    assert model.config.use_cache is False


def test_undo_refuses_over_a_later_replacement():
    model = build()
    report = quiet(model)
    ours = model.model.norm.forward
    model.model.norm.forward = functools.partial(ours)
    with pytest.raises(RuntimeError, match=r"undo: model.norm.forward was replaced after accelerate"):
        report.undo()
    assert model.config._attn_implementation == "fastllm"
    model.model.norm.forward = ours
    report.undo()


def test_two_models_of_one_config_do_not_affect_each_other():
    first = build()
    second = type(first)(first.config).eval()
    second.load_state_dict(first.state_dict())
    before = logits(second)
    report = quiet(first, weights="int8")
    assert logits(second).equal(before)
    assert second.config._attn_implementation == "sdpa"
    other = quiet(second)
    report.undo()
    assert first.config._attn_implementation == "sdpa"
    assert second.config._attn_implementation == "fastllm"
    assert logits(first).equal(before)
    other.undo()
    assert logits(second).equal(before)
    assert logits(build()).equal(before)


def test_failure_halfway_restores_the_model(monkeypatch):
    from fastllm.integrations import transformers as under_test

    model = build()
    before, calls = logits(model), []
    apply = under_test._Change.apply

    def failing(change):
        calls.append(change)
        if len(calls) == 9:
            raise MemoryError
        apply(change)

    monkeypatch.setattr(under_test._Change, "apply", failing)
    with pytest.raises(MemoryError):
        quiet(model, weights="int4")
    assert logits(model).equal(before)
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.undo()
    quiet(model)


def test_copies_and_pickles_of_an_accelerated_model_work():
    model = build()
    quiet(model, weights="int8")
    wanted = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.model.norm.forward.args[0] is twin.model.norm
        assert logits(twin).equal(wanted)


# ---------------------------------------------------------------- the report


def test_the_report_says_what_and_why(capsys):
    model = build("qwen3")
    report = fastllm.accelerate(model)
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    assert report.counts == {"rms_norm": 9, "rotary": 2, "attention": 2, "gated_mlp": 2}
    why = {left.module: left.why for left in report.left}
    assert why["lm_head"] == "weights=None leaves Linear layers to PyTorch"
    leaves = {name for name, module in model.named_modules() if not list(module.children()) and name}
    assert leaves <= set(why) | {swap.module for swap in report.swapped} | {f"model.layers.{i}.mlp.act_fn" for i in (0, 1)}


def test_another_model_is_left_as_it_was():
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=97)
    model = transformers.GPT2LMHeadModel(config).eval()
    before = logits(model)
    report = quiet(model, weights="int4")
    assert logits(model).equal(before)
    assert not report.swapped
    assert {left.why for left in report.left} == {
        "model_type 'gpt2' is none of those that fastllm knows (llama, mistral, qwen2, qwen3)"
    }
    assert "swapped nothing" in str(report)
    report.undo()


def test_a_module_that_is_not_transformers_own_is_left(monkeypatch):
    """Another forward under a known name, a forward that another library has put there, a class from elsewhere."""
    modeling = sys.modules["transformers.models.llama.modeling_llama"]

    class LlamaRMSNorm(modeling.LlamaRMSNorm):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    model = build()
    first, second = model.model.layers
    first.input_layernorm.__class__ = LlamaRMSNorm
    theirs = second.mlp.forward
    second.mlp.forward = lambda x: 0.5 * theirs(x)
    second.self_attn.q_proj.forward = second.self_attn.q_proj.forward
    before = logits(model)
    report = quiet(model)
    why = {left.module: left.why for left in report.left}
    assert why["model.layers.0.input_layernorm"] == f"it comes from {__name__}, not from transformers"
    assert why["model.layers.1.mlp"] == "another library has put a forward of its own on it"
    assert report.counts == {"rms_norm": 4, "rotary": 2, "attention": 2, "gated_mlp": 1}
    verdict = check(logits(model), before.double(), before)
    assert verdict.error < 1e-4 * float(before.abs().max())
    report.undo()
    assert {left.module: left.why for left in quiet(model, weights="int8").left}["model.layers.1.self_attn.q_proj"] == (
        "another library has put a forward of its own on it"
    )


@pytest.mark.parametrize(
    ("function", "count"),
    [("LlamaRMSNorm", "rms_norm"), ("LlamaMLP", "gated_mlp"), ("LlamaAttention", "rotary"), ("rotate_half", "rotary")],
)
def test_an_unknown_release_of_transformers_keeps_its_forward(monkeypatch, function, count):
    """The source that a forward stands for is compared, not the version: one changed word is enough."""
    known = {"rms_norm": "rms_norm", "gated_mlp": "mlp", "rotary": "llama"}[count]
    known = "rotate_half" if function == "rotate_half" else known
    changed = (
        _hf_layers.KNOWN[known].replace("hidden_states", "hidden", 1).replace("x1 =", "y1 =").replace("down_proj =", "d =")
    )
    monkeypatch.setitem(_hf_layers.KNOWN, known, changed)
    model = build()
    before = logits(model)
    report = quiet(model)
    assert count not in report.counts
    assert report.counts["attention"] == 2
    assert any("is not the one that fastllm knows" in left.why and function in left.why for left in report.left)
    assert float((logits(model) - before).abs().max()) < 1e-4 * float(before.abs().max())


# ---------------------------------------------------------------- gradients, compile, attention weights, saving


def test_a_training_step_has_pytorch_gradients():
    model = build("qwen3")
    exact = copy.deepcopy(model).double()

    def gradients(m):
        m.zero_grad()
        m(IDS, attention_mask=LEFT, labels=IDS).loss.backward()
        return [p.grad.clone() for p in m.parameters()]

    r, p = gradients(exact), gradients(model)
    report = quiet(model)
    assert any("where a gradient is wanted" in note for note in report.notes)
    for (name, _), y, a, b in zip(model.named_parameters(), gradients(model), r, p):
        verdict = check(y, a, b, factor=3)
        assert verdict.ok, f"{name}: {verdict.why}"


def test_dropout_is_pytorchs():
    model = build(attention_dropout=0.5).train()
    torch.manual_seed(0)
    wanted = logits(model, attention_mask=LEFT)[LEFT.bool()]
    quiet(model)
    torch.manual_seed(0)
    got = logits(model, attention_mask=LEFT)[LEFT.bool()]
    assert float((got - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_a_quantised_layer_passes_gradients_on():
    model = build()
    quiet(model, weights="int8")
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.abs().sum() > 0


@pytest.mark.parametrize(("kind", "weights"), [("llama", "int4"), ("mistral window", None)])
def test_compiles_without_a_graph_break(kind, weights):
    model = build(kind)
    quiet(model, weights=weights)
    wanted = plain(model), left_padded(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for call, want in zip((plain, left_padded), wanted):
        assert float((call(compiled) - want).abs().max()) < 1e-5 * float(want.abs().max()), call.__name__


def test_attention_weights_are_refused_in_words_and_eager_gives_them():
    model = build()
    before = logits(model)
    report = quiet(model)
    with pytest.raises(NotImplementedError, match=r"attention: output_attentions is True, expected False, because the fused"):
        logits(model, output_attentions=True)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(IDS, output_attentions=True)
    assert [tuple(a.shape) for a in out.attentions] == [(2, 8, 21, 21)] * 2
    assert float((out.logits - before).abs().max()) < 1e-4 * float(before.abs().max())
    model.set_attn_implementation("fastllm")
    logits(model)
    report.undo()
    assert logits(model).equal(before)


def test_float_checkpoints_are_unchanged(tmp_path):
    model = build("qwen2")
    before = logits(model)
    quiet(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config._attn_implementation == "sdpa"
    assert logits(again).equal(before)


# ---------------------------------------------------------------- refusals


def with_quantization_config(model):
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    return model


def accelerated(model):
    quiet(model)
    return model


BAD = {
    "a list": (lambda m: [m], {}, TypeError, r"accelerate: model is a list, expected a transformers.PreTrainedModel"),
    "a module": (lambda m: m.lm_head, {}, TypeError, r"accelerate: model is a Linear, expected a transformers"),
    "compiled": (torch.compile, {}, TypeError, r"accelerate: model is a OptimizedModule.*before torch.compile"),
    "meta": (lambda m: m.to("meta"), {}, ValueError, r"accelerate: device is 'meta.*because a meta tensor has no data"),
    "twice": (accelerated, {}, ValueError, r"accelerate: model is 'accelerated'.*call undo\(\)"),
    "bitsandbytes": (with_quantization_config, {}, ValueError, r"accelerate: model is 'quantised by bitsandbytes'"),
    "int3": (None, {"weights": "int3"}, ValueError, r"accelerate: weights is 'int3', expected None, 'int8' or 'int4'"),
    "group 48": (None, {"weights": "int4", "group_size": 48}, ValueError, r"accelerate: group_size is 48, expected None, 32"),
    "fp8": (None, {"weights": "int4", "activations": "fp8"}, ValueError, r"accelerate: activations is 'fp8', expected 'float'"),
    "group alone": (None, {"group_size": 32}, ValueError, r"accelerate: group_size is 32, expected nothing without weights"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(case):
    spoil, options, error, match = BAD[case]
    model = build()
    with pytest.raises(error, match=match):
        quiet(spoil(model) if spoil else model, **options)
    if spoil is None:
        assert model.config._attn_implementation == "sdpa"


def test_a_device_without_kernels_is_refused(monkeypatch):
    from fastllm.integrations import transformers as under_test

    monkeypatch.setattr(under_test, "_no_kernel", lambda *args, **kwargs: "cpu: it takes CPU tensors, not mps")
    with pytest.raises(NotImplementedError, match=r"accelerate: model is on cpu .*because cpu: it takes CPU tensors, not mps"):
        quiet(build())


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install fastllm\[transformers\]"):
        fastllm.accelerate(object())


def test_importing_fastllm_does_not_import_transformers():
    code = "import sys, fastllm; fastllm.accelerate; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------- the real model


def test_the_real_model(real_path):
    from fastllm.demo import _transformers_model

    model = _transformers_model(str(real_path), torch.float32).eval()
    ids = torch.randint(0, 49152, (1, 48), generator=torch.Generator().manual_seed(0))

    def run(m):
        with torch.no_grad():
            return m(ids).logits

    prompt = torch.tensor([[504, 3575, 282, 4649, 314]])  # The capital of France is
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    p, tokens = run(model), model.generate(prompt, **options)
    report = quiet(model)
    assert report.counts == {"rms_norm": 61, "rotary": 30, "attention": 30, "gated_mlp": 30}
    y, ours = run(model), model.generate(prompt, **options)
    report.undo()
    assert run(model).equal(p)
    assert ours.equal(tokens)
    verdict = check(y, run(model.double()), p)
    assert verdict.ok, verdict.why
