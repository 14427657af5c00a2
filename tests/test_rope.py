"""rope_tables beside transformers' own rope functions, the ops beside its modelling code, and cache writes to the bit."""

from __future__ import annotations

import math

import pytest
import torch

import fastllm
from fastllm.backends import isa_names, use_isa
from fastllm.nn import rope_tables

transformers = pytest.importorskip("transformers")
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402
from transformers.models.cohere import modeling_cohere  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

LONG = 40000  # rows: beyond every original context below

# name: (config fields, rope_parameters). Values as in published configs of Llama, Qwen, Phi and Gemma where they have them.
SCALINGS = {
    "llama-2": ({"head_dim": 128}, {"rope_type": "default", "rope_theta": 10000.0}),
    "smollm2": ({"head_dim": 64}, {"rope_type": "default", "rope_theta": 100000}),
    "gemma-3 linear": ({"head_dim": 256}, {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}),
    "dynamic": ({"head_dim": 64, "max_position_embeddings": 2048}, {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}),
    "llama-3.2": (
        {"head_dim": 64, "max_position_embeddings": 131072},
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_theta": 500000.0,
        },
    ),
    "qwen-2.5 yarn": (
        {"head_dim": 128, "max_position_embeddings": 131072},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1000000.0},
    ),
    "yarn with mscale": (
        {"head_dim": 64, "max_position_embeddings": 163840},
        {
            "rope_type": "yarn",
            "factor": 40,
            "beta_fast": 24,
            "beta_slow": 2,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "original_max_position_embeddings": 4096,
            "rope_theta": 10000,
        },
    ),
    "yarn without truncation, attention factor": (
        {"head_dim": 96, "max_position_embeddings": 131072},
        {
            "rope_type": "yarn",
            "factor": 32.0,
            "truncate": False,
            "attention_factor": 1.25,
            "original_max_position_embeddings": 4096,
            "rope_theta": 150000.0,
        },
    ),
    "yarn, factor from the lengths": (
        {"head_dim": 64, "max_position_embeddings": 65536},
        {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 4096, "rope_theta": 10000.0},
    ),
    "phi-3 longrope": (
        {"head_dim": 96, "max_position_embeddings": 131072},
        {
            "rope_type": "longrope",
            "short_factor": [1.0 + 0.01 * i for i in range(48)],
            "long_factor": [1.0 + 1.3 * i for i in range(48)],
            "original_max_position_embeddings": 4096,
            "rope_theta": 10000.0,
        },
    ),
    "longrope with factors, partial": (
        {"head_dim": 128, "max_position_embeddings": 131072},
        {
            "rope_type": "longrope",
            "short_factor": [1.0] * 48,
            "long_factor": [2.0 + i for i in range(48)],
            "factor": 16.0,
            "attention_factor": 1.19,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 8192,
            "rope_theta": 10000.0,
        },
    ),
    "gemma-4 proportional": (
        {"head_dim": 256},
        {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
    ),
    "phi-2 partial": (
        {"head_dim": 80},
        {"rope_type": "linear", "factor": 1.0, "partial_rotary_factor": 0.4, "rope_theta": 1e4},
    ),
}


def config_of(fields, parameters):
    fields = {"max_position_embeddings": 8192, **fields}
    return modeling_llama.LlamaConfig(
        num_attention_heads=4, hidden_size=4 * fields["head_dim"], rope_parameters=dict(parameters), **fields
    )


def transformers_tables(config, inv_freq, scaling, rows):
    """LlamaRotaryEmbedding's own forward, on given frequencies."""
    module = modeling_llama.LlamaRotaryEmbedding.__new__(modeling_llama.LlamaRotaryEmbedding)
    torch.nn.Module.__init__(module)
    module.rope_type, module.attention_scaling, module.inv_freq, module.config = "given", scaling, inv_freq, config
    cos, sin = module(torch.empty(0), torch.arange(rows)[None])
    return cos[0], sin[0]


@pytest.mark.parametrize("seq_len", [100, LONG])
@pytest.mark.parametrize("name", SCALINGS)
def test_tables_are_those_of_transformers(name, seq_len):
    fields, parameters = SCALINGS[name]
    config = config_of(fields, parameters)
    if parameters["rope_type"] == "default":
        inv_freq, scaling = modeling_llama.LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=seq_len)
    cos, sin = transformers_tables(config, inv_freq, scaling, LONG)
    tables = rope_tables(
        LONG,
        fields["head_dim"],
        rope_scaling=parameters,
        max_position_embeddings=fields.get("max_position_embeddings", 8192),
        seq_len=seq_len,
    )
    assert tables.inv_freq.equal(inv_freq)
    assert tables.attention_scaling == scaling
    assert tables.cos.equal(cos)
    assert tables.sin.equal(sin)


def test_sequence_length_matters_where_it_should():
    for name, expected in {"dynamic": True, "phi-3 longrope": True, "llama-3.2": False, "qwen-2.5 yarn": False}.items():
        fields, parameters = SCALINGS[name]
        options = {"rope_scaling": parameters, "max_position_embeddings": fields.get("max_position_embeddings")}
        short, long = (rope_tables(9, fields["head_dim"], seq_len=n, **options) for n in (100, LONG))
        assert (not short.inv_freq.equal(long.inv_freq)) == expected, name


def test_a_model_s_own_rotary_module():
    """The whole way of a transformers model: config, module, apply_rotary_pos_emb; beside tables and apply_rotary."""
    fields, parameters = SCALINGS["llama-3.2"]
    module = modeling_llama.LlamaRotaryEmbedding(config_of(fields, parameters))
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 7, 64, generator=g), torch.randn(2, 2, 7, 64, generator=g)
    positions = torch.randint(0, 9000, (2, 7), generator=g)
    cos, sin = module(q, positions)
    tables = rope_tables(9000, 64, rope_scaling=parameters)
    assert tables.cos[positions].equal(cos)
    expected = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    for y, p in zip(fastllm.apply_rotary(q, k, tables.cos[positions], tables.sin[positions]), expected):
        assert float((y - p).abs().max()) <= 4 * torch.finfo(torch.float32).eps * float(p.abs().max())


def test_interleaved_tables_are_cohere_s():
    config = modeling_cohere.CohereConfig(
        hidden_size=128, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 8e6}
    )
    cos, sin = modeling_cohere.CohereRotaryEmbedding(config)(torch.empty(0), torch.arange(500)[None])
    tables = rope_tables(500, 32, rope_theta=8e6, interleaved=True)
    assert tables.cos.equal(cos[0])
    assert tables.sin.equal(sin[0])


def test_gguf_factors_divide_the_frequencies():
    """llama.cpp stores llama3's scaling as a divisor for each pair; both ways must meet."""
    _, parameters = SCALINGS["llama-3.2"]
    expected = rope_tables(100, 64, rope_scaling=parameters)
    plain = rope_tables(100, 64, rope_theta=500000.0)
    factors = plain.inv_freq / expected.inv_freq
    for stored in (factors, factors.tolist()):
        tables = rope_tables(100, 64, rope_theta=500000.0, rope_scaling={"rope_type": "factors", "factors": stored})
        error = (tables.inv_freq / expected.inv_freq - 1).abs().max()
        assert float(error) <= 2 * torch.finfo(torch.float32).eps


def test_legacy_names_and_precedence():
    _, parameters = SCALINGS["llama-3.2"]
    legacy = {k: v for k, v in parameters.items() if k not in ("rope_type", "rope_theta")} | {"type": "llama3"}
    assert rope_tables(50, 64, rope_theta=500000.0, rope_scaling=legacy).cos.equal(
        rope_tables(50, 64, rope_scaling=parameters).cos
    )
    assert rope_tables(50, 64, rope_theta=7.0, rope_scaling=parameters).cos.equal(
        rope_tables(50, 64, rope_scaling=parameters).cos
    )
    fields, phi = SCALINGS["phi-3 longrope"]
    su = {"type": "su", "short_factor": phi["short_factor"], "long_factor": phi["long_factor"]}
    options = {"max_position_embeddings": fields["max_position_embeddings"], "seq_len": 10}
    outside = rope_tables(50, 96, rope_scaling=su, original_max_position_embeddings=4096, **options)
    assert outside.cos.equal(rope_tables(50, 96, rope_scaling=phi, **options).cos)
    assert rope_tables(50, 80, rotary_dim=32).cos.equal(rope_tables(50, 80, partial_rotary_factor=0.4).cos)


def test_dtype_and_device_of_tables():
    exact, rounded = rope_tables(300, 64), rope_tables(300, 64, dtype=torch.bfloat16, device="cpu")
    assert rounded.cos.equal(exact.cos.bfloat16())
    assert rounded.inv_freq.dtype == torch.float32
    assert rope_tables(3, 64, device="meta").sin.device.type == "meta"


YARN = SCALINGS["qwen-2.5 yarn"][1]
LLAMA3 = SCALINGS["llama-3.2"][1]
PHI = SCALINGS["phi-3 longrope"][1]
BAD = [
    ({"rope_scaling": {"rope_type": "mrope"}}, ValueError, "rope_scaling['rope_type'] is 'mrope'"),
    ({"rope_scaling": {"rope_type": 3}}, ValueError, "rope_scaling['rope_type'] is 3"),
    ({"rope_scaling": "yarn"}, TypeError, "rope_scaling is a str"),
    ({"rope_scaling": {"rope_type": "linear"}}, ValueError, "rope_scaling['factor'] is None"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, ValueError, "rope_scaling['factor'] is 0.0"),
    ({"rope_scaling": {"rope_type": "linear", "factor": math.nan}}, ValueError, "rope_scaling['factor'] is nan"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "8"}}, TypeError, "rope_scaling['factor'] is a str"),
    ({"rope_scaling": {"rope_type": "linear", "factor": True}}, TypeError, "rope_scaling['factor'] is a bool"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ValueError, "max_position_embeddings is None"),
    ({"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}}, ValueError, "['low_freq_factor'] is None"),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": 5.0}}, ValueError, "rope_scaling['low_freq_factor'] is 5.0"),
    (
        {"rope_scaling": {k: v for k, v in YARN.items() if k[0] != "o"}},
        ValueError,
        "['original_max_position_embeddings'] is None",
    ),
    ({"rope_scaling": {k: v for k, v in YARN.items() if k != "factor"}}, ValueError, "max_position_embeddings is None"),
    ({"rope_scaling": YARN | {"beta_fast": 0.5}}, ValueError, "rope_scaling['beta_fast'] is 0.5"),
    ({"rope_scaling": PHI}, ValueError, "the length of rope_scaling['long_factor'] is 48, expected 32"),
    ({"rope_scaling": PHI | {"long_factor": None}}, TypeError, "rope_scaling['long_factor'] is a NoneType"),
    (
        {"rope_scaling": {"rope_type": "factors", "factors": [1.0] * 31 + [-1.0]}},
        ValueError,
        "rope_scaling['factors'][31] is -1.0",
    ),
    ({"rope_theta": 0}, ValueError, "rope_theta is 0"),
    ({"rope_theta": None}, TypeError, "rope_theta is a NoneType"),
    ({"rotary_dim": 66}, ValueError, "rotary_dim is 66"),
    ({"rotary_dim": 31}, ValueError, "rotary_dim is 31"),
    ({"partial_rotary_factor": 0.02}, ValueError, "rotary_dim is 1"),
    ({"partial_rotary_factor": -0.5}, ValueError, "partial_rotary_factor is -0.5"),
    ({"max_positions": 0}, ValueError, "max_positions is 0"),
    ({"max_positions": 1 << 25}, ValueError, "max_positions is 33554432"),
    ({"max_positions": 10.0}, TypeError, "max_positions is a float"),
    ({"seq_len": 0}, ValueError, "seq_len is 0"),
    ({"dtype": torch.int8}, TypeError, "dtype has dtype torch.int8"),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD, ids=[text for *_, text in BAD])
def test_bad_configuration(change, error, text):
    with pytest.raises(error) as caught:
        rope_tables(**{"max_positions": 4, "head_dim": 64} | change)
    assert str(caught.value).startswith("rope_tables: ")
    assert text in str(caught.value)


# ---------------------------------------------------------------- cache writes, to the bit


def cache_inputs(B=3, H=4, Hk=2, T=5, D=48, slots_in=11, dtype=torch.bfloat16, cache=None):
    g = torch.Generator().manual_seed(1)
    tables = rope_tables(64, D)
    return {
        "q": torch.randn(B, T, H, D, generator=g).to(dtype).transpose(1, 2),
        "k": torch.randn(B, T, Hk, D, generator=g).to(dtype).transpose(1, 2),
        "v": torch.randn(B, T, Hk, D, generator=g).to(dtype).transpose(1, 2),
        "cos": tables.cos,
        "sin": tables.sin,
        "k_cache": torch.full((B, Hk, slots_in, D), float("nan"), dtype=cache or dtype),
        "v_cache": torch.full((B, Hk, slots_in, D), float("nan"), dtype=cache or dtype),
        "positions": torch.randint(0, 64, (B, T), generator=g),
        "slots": torch.stack([torch.randperm(slots_in, generator=g)[:T] for _ in range(B)]),
    }


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", isa_names())
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None), (torch.float32, torch.bfloat16)]
)
def test_the_cache_holds_what_was_written_and_nothing_else(dtypes, isa, threads, backend):
    x = cache_inputs(T=40, slots_in=50, dtype=dtypes[0], cache=dtypes[1])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with use_isa(isa), fastllm.use_backend(backend):
            q = fastllm.apply_rotary_cache(**x)
            expected_q, expected_k = fastllm.apply_rotary(x["q"], x["k"], x["cos"][x["positions"]], x["sin"][x["positions"]])
    finally:
        torch.set_num_threads(before)
    assert q.equal(expected_q)
    assert q.stride() == expected_q.stride()
    for b in range(3):
        slots = x["slots"][b]
        others = torch.ones(50, dtype=torch.bool).index_fill(0, slots, False)
        if dtypes[1] is None or backend == "reference":  # the kernel rounds fp32 to the cache's dtype once, from fp32
            assert x["k_cache"][b, :, slots].equal(expected_k[b].to(x["k_cache"].dtype))
        assert x["v_cache"][b, :, slots].equal(x["v"][b].to(x["v_cache"].dtype))
        assert bool(x["k_cache"][b, :, others].isnan().all())
        assert bool(x["v_cache"][b, :, others].isnan().all())


def test_v_is_copied_bit_for_bit():
    """Signalling NaNs, infinities and subnormals included."""
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        v = every.view(dtype).view(1, 2, 512, 64)
        x = cache_inputs(B=1, H=2, T=512, D=64, slots_in=512, dtype=dtype)
        x |= {"v": v, "positions": torch.zeros(512, dtype=torch.int64), "slots": torch.arange(512)}
        fastllm.apply_rotary_cache(**x)
        assert x["v_cache"].view(torch.int16).equal(v.view(torch.int16))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("positions", 64, "positions holds 64 for token 3, expected 0 to 63, the rows of cos"),
        ("positions", -1, "positions holds -1 for token 3, expected 0 to 63, the rows of cos"),
        ("slots", 11, "slots holds 11 for token 3, expected 0 to 10, the rows of k_cache"),
        ("slots", -(2**62), f"slots holds {-(2**62)} for token 3, expected 0 to 10, the rows of k_cache"),
    ],
)
def test_an_index_out_of_range_writes_nothing(backend, name, value, text):
    x = cache_inputs()
    x[name][2, 3] = value
    with fastllm.use_backend(backend), pytest.raises(ValueError, match=f"apply_rotary_cache: {text}"):
        fastllm.apply_rotary_cache(**x)
    assert bool(x["k_cache"].isnan().all())
    assert bool(x["v_cache"].isnan().all())


def test_positions_are_the_slots_where_none_are_given():
    x = cache_inputs()
    x["positions"] = torch.arange(2, 7)
    y = {k: v.clone() if k.endswith("cache") else v for k, v in x.items()}
    x.pop("slots")
    y["slots"] = y["positions"].expand(3, 5)
    assert fastllm.apply_rotary_cache(**x).equal(fastllm.apply_rotary_cache(**y))
    assert x["k_cache"][:, :, 2:7].equal(y["k_cache"][:, :, 2:7])
    x["positions"] = torch.full((5,), 11)
    with pytest.raises(ValueError, match="positions holds 11 for token 0, expected 0 to 10, the rows of k_cache"):
        fastllm.apply_rotary_cache(**x)


def test_overlapping_cache_memory_is_refused():
    x = cache_inputs()
    x["k_cache"] = x["k_cache"][:1].expand(3, -1, -1, -1)
    with pytest.raises(ValueError, match="k_cache has stride 0 in dim 0"):
        fastllm.apply_rotary_cache(**x)


def test_a_write_is_seen_by_autograd():
    """A cache saved for a backward and overwritten since must raise there, not give a wrong gradient."""
    x = cache_inputs(dtype=torch.float32)
    scale = torch.ones(1, requires_grad=True)
    saved = (scale * x["k_cache"]).sum()
    with torch.no_grad():
        fastllm.apply_rotary_cache(**x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_a_gradient_through_the_cache_is_refused():
    for name in ("q", "k", "v", "cos", "k_cache"):
        x = cache_inputs(dtype=torch.float32)
        x[name] = x[name].clone().requires_grad_()
        with pytest.raises(NotImplementedError, match="apply_rotary_cache: no gradient, because"):
            fastllm.apply_rotary_cache(**x)
        assert bool(x["k_cache"].isnan().all())


# ---------------------------------------------------------------- memory order


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_result_keeps_the_memory_order_of_a_projection(backend):
    cos, sin = torch.rand(1, 5, 16), torch.rand(1, 5, 16)
    for T in (5, 1):
        buffer = torch.randn(2, T, 6 + 2 + 2, 16)
        q, k = buffer[:, :, :6].transpose(1, 2), buffer[:, :, 6:8].transpose(1, 2).contiguous()
        with fastllm.use_backend(backend):
            y, z = fastllm.apply_rotary(q, k, cos[:, :T], sin[:, :T])
        assert y.transpose(1, 2).is_contiguous()
        assert z.is_contiguous()
        y.transpose(1, 2).reshape(2, T, -1).view(2, T, 6, 16)  # what a model does next: no copy needed
