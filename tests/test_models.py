"""The thin LLaMA against transformers, on every architecture it covers: small, random, and the real one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import fastllm
from fastllm.backends import use_isa
from fastllm.evaluation.quality import agreement, losses_of, perplexity, windows
from fastllm.measure.check import check
from fastllm.models import loading, reference_ops
from fastllm.models.llama import Llama
from fastllm.models.loaders import TensorMap

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ARCHITECTURES = {
    "llama": transformers.LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama tied, llama3 rope": transformers.LlamaConfig(
        **SMALL, tie_word_embeddings=True, rope_parameters={"rope_theta": 10000.0, **LLAMA3_SCALING}
    ),
    "llama multi-query, wide head": transformers.LlamaConfig(**{**SMALL, "num_key_value_heads": 1}, head_dim=48),
    "mistral with a window": transformers.MistralConfig(**SMALL, sliding_window=24),
    "qwen2": transformers.Qwen2Config(**SMALL, use_sliding_window=False),
    "qwen3": transformers.Qwen3Config(**SMALL, head_dim=32, use_sliding_window=False),
}


def save(config, folder, dtype=torch.float32):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():  # biases and norms start at constants that hide mistakes
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    model = model.to(dtype)
    model.save_pretrained(folder)
    return model


def ids_of(batch, tokens, seed=1):
    return torch.randint(3, SMALL["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_within_the_rule(name, tmp_path):
    theirs = save(ARCHITECTURES[name], tmp_path)
    ours = fastllm.load(tmp_path)
    ids = ids_of(2, 61)
    with torch.no_grad():
        p = theirs(ids).logits
        r = theirs.double()(ids).logits
    verdict = check(ours.logits(ids), r, p)
    assert verdict.ok, verdict.why


@pytest.mark.parametrize("name", ["llama", "mistral with a window", "qwen3"])
def test_bf16_is_as_near_to_float64_as_transformers_is(name, tmp_path):
    theirs = save(ARCHITECTURES[name], tmp_path, torch.bfloat16)
    ours = fastllm.load(tmp_path)
    assert ours.llama.dtype == torch.bfloat16
    ids = ids_of(2, 61)
    with torch.no_grad():
        p = theirs(ids).logits
        r = theirs.double()(ids).logits
    verdict = check(ours.logits(ids), r, p)
    assert verdict.ok, verdict.why


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_losses_are_within_the_rule(name, dtype, tmp_path):
    theirs = save(ARCHITECTURES[name], tmp_path, dtype)
    ours = fastllm.load(tmp_path)
    ids = ids_of(2, 61)

    def losses(logits):
        return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")

    with torch.no_grad():
        p = losses(theirs(ids).logits.float())
        r = losses(theirs.double()(ids).logits)
    verdict = check(ours.losses(ids), r, p)
    assert verdict.ok, verdict.why
    assert ours.losses(ids[:, :1]).shape == (2, 0)


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("weights", [None, "int8"])
def test_losses_are_those_of_the_logits(weights, activations, tmp_path):
    from dataclasses import replace

    save(ARCHITECTURES["llama"], tmp_path)
    ours = fastllm.load(tmp_path, weights=weights, group_size=32, activations=activations)
    if weights:  # loading keeps the head float
        w = ours.llama.weights
        ours.llama.weights = replace(w, head=fastllm.quantize(w.head, 8, 32).pack())
    texts = [ids_of(1, 61), ids_of(1, 40, seed=2)]
    for ids in texts:
        logits, target = ours.logits(ids)[0, :-1], ids[0, 1:]
        r = torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")
        p = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        verdict = check(ours.losses(ids)[0], r, p)
        assert verdict.ok, verdict.why
    assert perplexity(ours.losses, texts) == pytest.approx(perplexity(losses_of(ours.logits), texts), rel=2**-20)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_generation_equals_transformers(name, tmp_path):
    theirs = save(ARCHITECTURES[name], tmp_path)
    theirs.generation_config.eos_token_id = None
    ours = fastllm.load(tmp_path)
    ours.llama = Llama(
        ours.config, ours.llama.weights, ours.llama.rope, dtype=ours.llama.dtype, activations="float", ops=fastllm.ops
    )
    prompts = ids_of(3, 40)
    ragged = [prompts[0, :40].tolist(), prompts[1, :7].tolist(), prompts[2, :23].tolist()]
    expected = []
    for prompt in ragged:
        with torch.no_grad():
            full = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)
        expected.append(full[0, len(prompt) :].tolist())
    from fastllm.generation.loop import generate_ids
    from fastllm.generation.sampling import Sampling

    steps = list(generate_ids(ours.llama, ragged, Sampling(), max_new_tokens=20, context=ours.context))
    assert [[token for step in steps for token in step[b]] for b in range(3)] == expected


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_page_runs_on_the_reference_ops(name, tmp_path):
    save(ARCHITECTURES[name], tmp_path)
    ours = fastllm.load(tmp_path)
    plain = Llama(ours.config, ours.llama.weights, ours.llama.rope, ops=reference_ops)
    ids = ids_of(2, 33)
    with torch.inference_mode():
        expected = plain.head(plain.hidden_states(ids, plain.new_cache(2, 33)))
    error = (ours.logits(ids) - expected).abs().max()
    assert error <= 2**-16 * expected.abs().max()  # two orders of fp32 summation
    with fastllm.use_backend("reference"):
        assert torch.equal(ours.logits(ids), expected)


@pytest.mark.parametrize(("weights", "activations"), [("int8", "float"), ("int8", "int8"), ("int4", "float"), ("int4", "int8")])
def test_quantising_at_load_degrades_in_the_order_it_should(weights, activations, tmp_path):
    save(ARCHITECTURES["llama"], tmp_path)
    exact = fastllm.load(tmp_path)
    ours = fastllm.load(tmp_path, weights=weights, group_size=32, activations=activations)
    ids = ids_of(2, 61)
    found = agreement(iter(exact.logits(ids)), iter(ours.logits(ids)))
    int4 = agreement(iter(exact.logits(ids)), iter(fastllm.load(tmp_path, weights="int4", group_size=32).logits(ids)))
    assert 0 < found.rms_logit_error <= 1.2 * int4.rms_logit_error


@pytest.mark.parametrize(
    ("head", "group_size", "symmetric"), [("int8", 32, None), ("int8", -1, None), ("int4", 32, None), ("int4", 32, True)]
)
@pytest.mark.parametrize("name", ["llama", "qwen2"])  # with a head of its own, and tied
def test_a_quantised_head(name, head, group_size, symmetric, tmp_path):
    from fastllm.generation.decode import DecodeStep
    from fastllm.quant import QuantizedTensor

    save(ARCHITECTURES[name], tmp_path)
    options = {"weights": head, "group_size": group_size, "symmetric": symmetric, "activations": "int8"}
    exact, ours = fastllm.load(tmp_path), fastllm.load(tmp_path, head=head, **options)
    w = ours.llama.weights
    for table in (w.embedding, w.head, w.layers[0].gate_up):
        assert isinstance(table, QuantizedTensor)
        assert (table.bits, table.group_size) == (int(head[3:]), group_size if group_size > 0 else ours.config.hidden_size)
        assert (table.minimum is None) == (head == "int8" or symmetric is True)
    assert (w.head is w.embedding) == ours.config.tie_embeddings
    assert not isinstance(fastllm.load(tmp_path, **options).llama.weights.head, QuantizedTensor)
    ids = ids_of(2, 61)
    found = agreement(iter(exact.logits(ids)), iter(ours.logits(ids)))
    int4 = agreement(iter(exact.logits(ids)), iter(fastllm.load(tmp_path, weights="int4", group_size=32).logits(ids)))
    assert 0 < found.rms_logit_error < (1 if head == "int8" else 3) * int4.rms_logit_error
    with torch.inference_mode():
        step = DecodeStep(ours.llama, ours.llama.new_cache(1, 8))
        step([5])
    assert step._replay is not None  # no product is PyTorch's any more
    with pytest.raises(ValueError, match="load: head is 'int3', expected None, 'int8' or 'int4'"):
        fastllm.load(tmp_path, head="int3")
    with pytest.raises(ValueError, match="load: symmetric is 1.5, expected None, True or False"):
        fastllm.load(tmp_path, head=head, symmetric=1.5)


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_matrices_are_read_in_pieces(weights, tmp_path, monkeypatch):
    """A model takes its own memory while it is loaded, and that of a piece: no matrix is ever held twice."""
    save(ARCHITECTURES["qwen2"], tmp_path)
    ids = ids_of(2, 20)
    expected = fastllm.load(tmp_path, weights=weights, group_size=32).logits(ids)
    read, rows = [], TensorMap.rows

    def watched(self, name, start, stop):
        read.append((stop - start) * (self.shapes[name][1] if len(self.shapes[name]) == 2 else 1))
        return rows(self, name, start, stop)

    monkeypatch.setattr(TensorMap, "rows", watched)
    monkeypatch.setattr(loading, "PIECE_WEIGHTS", 16 * 352)  # a block of the widest rows
    assert torch.equal(fastllm.load(tmp_path, weights=weights, group_size=32).logits(ids), expected)
    assert max(read) <= 16 * 352


def test_text_needs_a_tokenizer_and_says_so(tmp_path):
    save(ARCHITECTURES["llama"], tmp_path)
    model = fastllm.load(tmp_path)
    assert len(model.generate(ids_of(1, 5)[0], max_new_tokens=4)) <= 4
    assert [len(row) <= 3 for row in model.generate(ids_of(2, 5), max_new_tokens=3)] == [True, True]
    with pytest.raises(ValueError, match="no tokenizer"):
        model.generate("hello")


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("dtype", torch.float64, TypeError, "dtype has dtype torch.float64"),
        ("weights", "int3", ValueError, "weights is 'int3', expected None, 'int8' or 'int4'"),
        ("tokenizer", "no", ValueError, "tokenizer is 'no', expected True or False"),
        ("activations", "fp8", ValueError, "activations is 'fp8'"),
        ("context", 10**9, ValueError, "context is 1000000000, expected from 1 to 256"),
        ("context", 0, ValueError, "context is 0"),
    ],
)
def test_load_refuses_in_words(argument, value, error, message, tmp_path):
    save(ARCHITECTURES["llama"], tmp_path)
    with pytest.raises(error, match=message):
        fastllm.load(tmp_path, **{argument: value})


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
    save(ARCHITECTURES["llama"], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'mamba', expected llama, mistral, qwen2 or qwen3"):
        fastllm.load(tmp_path)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([[1, 2]], TypeError, "ids is a list, expected a torch.Tensor"),
        (torch.zeros(1, 3), TypeError, "ids has dtype torch.float32"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"ids has shape \(3,\)"),
        (torch.zeros(1, 0, dtype=torch.int64), ValueError, "at least one token"),
        (torch.zeros(1, 257, dtype=torch.int64), ValueError, "at most 256 tokens"),
        (torch.full((1, 2), 320), ValueError, "320"),
        (torch.full((1, 2), -1), ValueError, "-1"),
    ],
)
def test_logits_refuses_bad_ids(ids, error, message, tmp_path):
    save(ARCHITECTURES["llama"], tmp_path)
    with pytest.raises(error, match=message):
        fastllm.load(tmp_path).logits(ids)
    with pytest.raises(error, match=message):
        fastllm.load(tmp_path).losses(ids)


# ---------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def real(real_path):
    return fastllm.load(real_path)


@pytest.fixture(scope="module")
def prose(real):
    import pydoc_data.topics

    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    # 512 tokens would be too few: what rounding costs then swings between 1.1 and 1.5 % from one rung to another.
    return windows(real.tokenizer.encode(text, add_special_tokens=False)[:1024], length=256, tokens=1024)


def test_real_model_int8_activations_cost_little(real, prose):
    try:
        real.llama.activations = "float"
        exact = perplexity(real.losses, prose)
        real.llama.activations = "int8"
        rounded = perplexity(real.losses, prose)
    finally:
        real.llama.activations = "float"
    assert 3 < exact < 30
    assert rounded < 1.015 * exact


def test_real_model_speaks(real):
    text = real.generate("The capital of France is", max_new_tokens=8)
    assert "Paris" in text
    assert "".join(real.stream("The capital of France is", max_new_tokens=8)) == text
    answers = real.generate(["The capital of France is", "The capital of Italy is the city of"], max_new_tokens=8)
    assert answers[0] == text
    assert "Rome" in answers[1]
    cut = real.generate("The capital of France is", max_new_tokens=8, stop="Paris")
    assert cut == text[: text.index("Paris")]
    chat = real.generate([{"role": "user", "content": "Say hello."}], max_new_tokens=12)
    assert isinstance(chat, str)
    assert chat


def test_real_model_without_its_tokenizer(real, real_path):
    without = fastllm.load(real_path, tokenizer=False)
    ids = torch.tensor(real.tokenizer.encode("The capital of France is"))
    assert without.generate(ids, max_new_tokens=4) == real.generate(ids, max_new_tokens=4)
    with pytest.raises(ValueError, match="no tokenizer"):
        without.generate("The capital of France is")


def test_real_model_guesses_and_batches_change_nothing(real):
    from fastllm.generation.speculative import GenerationReport

    line = "The Amazon is the largest river in South America. It flows through Peru, Colombia and Brazil."
    questions = [f"Repeat this text word for word:\n\n{line}", "Why is the sky blue?"]
    chats = [[{"role": "user", "content": q}] for q in questions]
    alone = [real.generate(chat, max_new_tokens=24) for chat in chats]
    assert real.generate(chats, max_new_tokens=24) == alone
    report = GenerationReport()
    assert real.generate(chats[0], max_new_tokens=24, speculate="lookup", report=report) == alone[0]
    assert report.tokens_per_pass > 1.5
    assert "".join(real.stream(chats[0], max_new_tokens=24, speculate="lookup")) == alone[0]


# ---------------------------------------------------------------- the recorded decode step


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.bfloat16])
def test_a_narrower_cache_changes_little(cache_dtype, tmp_path):
    save(ARCHITECTURES["llama"], tmp_path)
    ids = ids_of(2, 40)
    plain = fastllm.load(tmp_path)
    narrow = fastllm.load(tmp_path, cache_dtype=cache_dtype)
    assert {t.dtype for t in narrow.llama.new_cache(1, 4).layers[0][:2]} == {cache_dtype}
    by_torch = Llama(narrow.config, narrow.llama.weights, narrow.llama.rope, cache_dtype=cache_dtype, ops=reference_ops)
    with torch.inference_mode():
        expected = by_torch.head(by_torch.hidden_states(ids, by_torch.new_cache(2, 40)))
    far, near = (float((narrow.logits(ids) - x).abs().max()) for x in (plain.logits(ids), expected))
    assert 0.0 < far < 0.05 * float(expected.abs().max())
    assert near < far / 10  # what is left are ties


def test_a_cache_that_no_kernel_reads_is_refused(tmp_path):
    save(ARCHITECTURES["llama"], tmp_path)
    for options in ({"cache_dtype": torch.float64}, {"dtype": torch.bfloat16, "cache_dtype": torch.float16}):
        with pytest.raises(TypeError, match=r"load: cache_dtype"):
            fastllm.load(tmp_path, **options)


@pytest.mark.parametrize("name", ["llama", "mistral with a window", "qwen2", "qwen3"])
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_a_replayed_step_gives_the_bits_of_a_computed_one(name, activations, tmp_path):
    from fastllm.generation.decode import DecodeStep
    from fastllm.generation.prefill import prefill
    from fastllm.quant import quantize

    save(ARCHITECTURES[name], tmp_path)
    llama = fastllm.load(tmp_path, weights="int4", group_size=32, activations=activations).llama
    w = llama.weights
    llama.weights = replace(w, embedding=quantize(w.embedding, 8, 32).pack(), head=quantize(w.head, 8, 32).pack())
    prompts = [ids_of(1, 37)[0].tolist(), ids_of(1, 11, seed=2)[0].tolist()]
    caches = [llama.new_cache(2, 60) for _ in range(2)]
    for cache in caches:
        with torch.inference_mode():
            prefill(llama, prompts, cache)
    replayed, computed = DecodeStep(llama, caches[0]), DecodeStep(llama, caches[1])
    computed._how = "_compute"
    for step in range(20):
        ids = [3 + step, 90 - step]
        assert torch.equal(replayed(ids), computed(ids))
        for cache in caches:
            cache.lengths += 1
    assert replayed._replay is not None
    assert computed._replay is None


def prefilled(llama, prompts):
    """The prompts' logits and their cache, computed from Python."""
    cache, last = llama.new_cache(len(prompts), 60), []
    for b, prompt in enumerate(prompts):
        row = cache.row(b)
        for part in torch.tensor([prompt]).split(llama.prefill_tokens, dim=1):
            hidden = llama.hidden_states(part, row, last=True)[:, -1]
            row.lengths += part.shape[1]
        last.append(hidden)
    return llama.head(torch.cat(last)), cache


def same_cache(a, b):
    """The tokens' slots; beyond, an int8 cache's scales are whatever."""
    length = int(a.lengths.max())
    assert a.lengths.tolist() == b.lengths.tolist()
    return all(
        torch.equal(x[:, :, :length], y[:, :, :length]) for c in zip(a.layers, b.layers) for x, y in zip(*c) if x is not None
    )


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_replayed_prompt_gives_the_bits_of_a_computed_one(name, activations, cache_dtype, tmp_path, monkeypatch):
    from fastllm.generation.prefill import prefill

    save(ARCHITECTURES[name], tmp_path)
    options = {"weights": "int4", "head": "int8", "group_size": 32, "activations": activations, "cache_dtype": cache_dtype}
    llama = fastllm.load(tmp_path, **options).llama
    monkeypatch.setattr(Llama, "prefill_tokens", 20)
    for turn in range(4):
        prompts = ids_of(2, 47, seed=turn).tolist()  # 20, 20 and 7 tokens of each
        with torch.inference_mode():
            cache = llama.new_cache(2, 60)
            logits = prefill(llama, prompts, cache)
            expected, other = prefilled(llama, prompts)
        assert torch.equal(logits, expected)
        assert same_cache(cache, other)
        llama.give_back(cache)
        assert len(cache.passes) == 4
        assert [p._replay is not None for p in cache.passes.values()] == [True, turn > 0, True, turn > 0]
        assert sorted(p._turn for p in cache.passes.values()) == [turn + 1] * 2 + [2 * turn + 2] * 2


def test_a_prompts_recording_ends_with_what_it_was_made_of(tmp_path, monkeypatch):
    from fastllm.generation import prefill as module

    save(ARCHITECTURES["llama"], tmp_path)
    llama = fastllm.load(tmp_path, weights="int4", head="int8", group_size=32, activations="int8").llama
    other = fastllm.load(tmp_path, weights="int8", group_size=32).llama
    threads = torch.get_num_threads()

    def turn(seed, replayed):
        prompt = ids_of(1, 37, seed=seed).tolist()
        with torch.inference_mode():
            cache = llama.new_cache(1, 60)
            logits = module.prefill(llama, prompt, cache)
            found = next(iter(cache.passes.values()))
            expected, whole = prefilled(llama, prompt)
        assert torch.equal(logits, expected)
        assert same_cache(cache, whole)
        llama.give_back(cache)
        assert (found._turn > 2) == replayed
        return found

    try:
        for seed in range(4):
            turn(seed, seed >= 2)
        llama.weights.layers[1] = other.weights.layers[1]
        for seed in range(4):
            turn(seed, seed >= 2)
        llama.weights = replace(llama.weights, norm=llama.weights.norm * 2)
        turn(4, False)
        llama.activations = "float"
        turn(5, False)
        torch.set_num_threads(threads + 1)
        turn(6, False)
        with use_isa("scalar"):
            turn(7, False)
        assert turn(8, False)._replay is None
        assert turn(9, False)._replay is not None
        with torch.inference_mode():
            llama.new_cache(1, 61)  # the used one was too small
        turn(10, False)
    finally:
        torch.set_num_threads(threads)


def test_a_prompts_recording_writes_to_no_memory_that_something_uses(tmp_path):
    from fastllm.generation.prefill import prefill

    save(ARCHITECTURES["llama"], tmp_path)
    llama = fastllm.load(tmp_path, weights="int4", head="int8", group_size=32, activations="int8").llama
    logits, held = [], []
    for seed in range(6):
        prompt = ids_of(1, 200, seed=seed).tolist()
        with torch.inference_mode():
            cache = llama.new_cache(1, 256)
            logits.append(prefill(llama, prompt, cache))
            (found,) = cache.passes.values()
            assert (found._replay is not None) == (seed > 0)
        llama.give_back(cache)
        if seed == 3:
            with llama.scratch() as memory, memory.small_ones_too():
                held = [memory.empty((p.size,), torch.uint8).fill_(7) for p in found._pieces]
            assert {t.data_ptr() for t in held} == {p.address for p in found._pieces}
    assert all(bool((t == 7).all()) for t in held)
    fresh = fastllm.load(tmp_path, weights="int4", head="int8", group_size=32, activations="int8").llama
    for seed, got in enumerate(logits):
        with torch.inference_mode():
            assert torch.equal(got, prefill(fresh, ids_of(1, 200, seed=seed).tolist(), fresh.new_cache(1, 256)))


def test_scratch_memory_of_a_large_prompt_is_not_kept(tmp_path, monkeypatch):
    from fastllm import pages
    from fastllm.generation.prefill import prefill

    save(ARCHITECTURES["llama"], tmp_path)
    llama = fastllm.load(tmp_path, weights="int4", head="int8", group_size=32, activations="int8").llama
    monkeypatch.setattr(Llama, "prefill_tokens", 20)
    for most, kept in ((pages.KEPT_SCRATCH, True), (0, False)):
        monkeypatch.setattr(pages, "KEPT_SCRATCH", most)
        with torch.inference_mode():
            cache = llama.new_cache(1, 60)
            prefill(llama, ids_of(1, 60).tolist(), cache)
        assert (bool(cache.passes), bool(llama._used_scratch)) == (kept, kept)
        llama.give_back(cache)


def test_a_prompt_that_pytorch_helps_with_is_not_replayed(tmp_path):
    from fastllm.generation.prefill import prefill

    save(ARCHITECTURES["llama"], tmp_path)
    for options in ({}, {"weights": "int8", "group_size": 32}):  # layers of float matrices; an embedding of them
        llama = fastllm.load(tmp_path, **options).llama
        for seed in range(3):
            with torch.inference_mode():
                cache = llama.new_cache(1, 60)
                prefill(llama, ids_of(1, 30, seed=seed).tolist(), cache)
            llama.give_back(cache)
            (found,) = cache.passes.values()
            assert found._replay is None


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_last_token_alone_is_what_it_is_among_all(name, cache_dtype, tmp_path):
    save(ARCHITECTURES[name], tmp_path)
    llama = fastllm.load(tmp_path, cache_dtype=cache_dtype).llama
    ids = ids_of(2, 40)
    whole, short = llama.new_cache(2, 40), llama.new_cache(2, 40)
    with torch.inference_mode():
        for part in ids[:, :33], ids[:, 33:]:
            expected = llama.hidden_states(part, whole)[:, -1:]
            got = llama.hidden_states(part, short, last=True)
            assert got.shape == expected.shape
            assert (got - expected).abs().max() <= 2**-17 * expected.abs().max()  # another kernel's order of sums
            for cache in whole, short:
                cache.lengths += part.shape[1]
    for a, b in zip(whole.layers, short.layers):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8])
def test_a_cache_that_is_given_back_is_the_next_one(cache_dtype, tmp_path, monkeypatch):
    from fastllm.models import llama as module

    save(ARCHITECTURES["llama"], tmp_path)
    llama = fastllm.load(tmp_path, cache_dtype=cache_dtype).llama

    def memory(cache):
        return [layer.keys.data_ptr() for layer in cache.layers]

    with torch.inference_mode():
        first = llama.new_cache(2, 60)
    for layer in first.layers:
        layer.keys.fill_(torch.nan if cache_dtype == torch.float32 else 127)
    first.lengths += 7
    where = memory(first)
    llama.give_back(first)
    with torch.inference_mode():
        second = llama.new_cache(2, 50)
    assert memory(second) == where
    assert (second.capacity, second.lengths.tolist(), second.layers[0].keys.shape[2]) == (50, [0, 0], 50)
    assert all(int(t.count_nonzero()) == 0 for layer in second.layers for t in layer if t is not None)
    second.lengths += 1  # outside of the mode
    llama.give_back(second)
    assert memory(llama.new_cache(2, 60)) == where  # all of it, not the part that was used
    others = [llama.new_cache(2, 60)]
    assert memory(others[0]) != where  # while it is in use
    for batch, capacity in ((1, 60), (2, 61)):
        llama.give_back(others[-1])
        others.append(llama.new_cache(batch, capacity))
        assert (others[-1].batch, others[-1].capacity) == (batch, capacity)
        assert memory(others[-1]) != memory(others[-2])
    llama.give_back(others[-1])
    llama.cache_dtype = torch.float16
    others.append(llama.new_cache(2, 61))
    assert others[-1].dtype == torch.float16
    monkeypatch.setattr(module, "KEPT_CACHE", others[-1].nbytes - 1)
    llama.give_back(others[-1])
    assert not llama._used_cache


def test_a_second_generation_is_the_first_ones_again(tmp_path):
    save(ARCHITECTURES["llama"], tmp_path)
    model = fastllm.load(tmp_path)
    long, short = ids_of(1, 50)[0], ids_of(1, 9, seed=3)[0]
    alone = fastllm.load(tmp_path).generate(short, max_new_tokens=8)
    model.generate(long, max_new_tokens=8)
    assert model.llama._used_cache
    assert model.generate(short, max_new_tokens=8) == alone


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_results_change_no_bit(name, bits, dtype, tmp_path, monkeypatch):
    """Norms and gates that write int8 give the logits of products that round what they read."""
    save(ARCHITECTURES[name], tmp_path)
    model = fastllm.load(tmp_path, weights=f"int{bits}", group_size=32, activations="int8", dtype=dtype)
    ids, asked = ids_of(2, 23), []
    rms_norm = fastllm.ops.rms_norm
    monkeypatch.setattr(fastllm.ops, "rms_norm", lambda *a, **k: asked.append(k.get("int8_group")) or rms_norm(*a, **k))
    logits = model.logits(ids)
    assert asked.count(32) == 2 * SMALL["num_hidden_layers"]
    plain = model.llama.hidden_states(ids, model.llama.new_cache(2, 23))  # with gradients on, nothing is written in int8
    assert asked.count(32) == 2 * SMALL["num_hidden_layers"]
    assert logits.equal(model.llama.head(plain))


def all_quantised(folder, activations, bits=4):
    """A model whose every matrix is quantised, so that no product is PyTorch's."""
    from fastllm.quant import quantize

    llama = fastllm.load(folder, weights=f"int{bits}", group_size=32, activations=activations).llama
    w = llama.weights
    llama.weights = replace(w, embedding=quantize(w.embedding, 8, 32).pack(), head=quantize(w.head, 8, 32).pack())
    return llama


def rows_of(llama, cache, part):
    """A cache of some of another's sequences."""
    copy = llama.new_cache(len(cache.lengths[part]), cache.capacity)
    for to, source in zip(copy.layers, cache.layers):
        for into, x in zip(to, source):
            if into is not None:
                into.copy_(x[part])
    copy.lengths.copy_(cache.lengths[part])
    return copy


@pytest.mark.parametrize(
    ("name", "activations", "bits", "cache_dtype"),
    [
        ("llama", "float", 4, torch.int8),
        ("llama multi-query, wide head", "int8", 8, None),
        ("mistral with a window", "float", 4, None),  # int8 activations would hide the last bits
        ("qwen3", "int8", 4, torch.float16),
    ],
)
def test_a_step_of_several_tokens_gives_the_bits_of_steps_of_one(name, activations, bits, cache_dtype, tmp_path):
    """What speculative decoding's equality stands on: alone or in a batch, on every rung, across a split of the keys (256)."""
    from fastllm.backends import isa_names, use_isa
    from fastllm.generation.decode import DecodeStep
    from fastllm.generation.prefill import prefill

    save(ARCHITECTURES[name], tmp_path)
    llama = all_quantised(tmp_path, activations, bits)
    llama.cache_dtype = cache_dtype or llama.dtype
    if llama.config.sliding_window:  # 24 would be one run of the kernel's sums, and hide where it starts
        llama.config = replace(llama.config, sliding_window=100)
    llama.rope = replace(llama.rope, cos=llama.rope.cos.repeat(2, 1), sin=llama.rope.sin.repeat(2, 1))  # room for 512
    lengths = [250, 11]
    prompts = [ids_of(1, n, seed=n)[0].tolist() for n in lengths]
    following = ids_of(2, 16, seed=5)
    for isa in [i for i in isa_names() if i != "scalar"]:
        with use_isa(isa):
            filled = llama.new_cache(2, 280)
            with torch.inference_mode():
                prefill(llama, prompts, filled)
            cache = rows_of(llama, filled, slice(None))
            step, alone = DecodeStep(llama, cache), []
            for t in range(16):
                alone.append(step(following[:, t].tolist()).clone())
                cache.lengths += 1
            expected = torch.stack(alone, 1)  # (B, 16, V)
            for b in (None, 0, 1):  # both, or one by itself
                part = slice(None) if b is None else slice(b, b + 1)
                for tokens in (3, 4, 8):
                    cache = rows_of(llama, filled, part)
                    several = DecodeStep(llama, cache, tokens)
                    for t in range(0, 16 - tokens + 1, tokens):  # the first is recorded, the others may be replayed
                        logits = several(following[part, t : t + tokens].flatten().tolist())
                        assert torch.equal(logits, expected[part, t : t + tokens].flatten(0, 1))
                        cache.lengths += tokens
                    assert (several._replay is not None) == (b is not None or llama.query_runs(tokens) == 1)


@pytest.mark.parametrize("name", ["llama", "mistral with a window"])
def test_a_batch_and_guesses_give_each_prompt_what_it_gets_alone(name, tmp_path):
    """To the token, where all matrices are quantised: prompts on both sides of a prefill chunk and of the decode kernel's rows."""
    from fastllm.generation.speculative import GenerationReport

    save(ARCHITECTURES[name], tmp_path)
    ours, draft, other = (fastllm.load(tmp_path) for _ in range(3))
    ours.llama, draft.llama = all_quantised(tmp_path, "int8"), all_quantised(tmp_path, "int8", bits=8)
    prompts = [ids_of(1, n, seed=n)[0] for n in (1, 4, 40, 129)]
    alone = [ours.generate(p, max_new_tokens=20) for p in prompts]
    assert ours.generate(prompts, max_new_tokens=20) == alone
    for speculate in ("lookup", draft, ours):
        report = GenerationReport()
        options = {"max_new_tokens": 20, "speculate": speculate, "report": report}
        assert ours.generate(prompts, **options) == alone
        assert ours.generate(prompts[3], **options) == alone[3]
        assert report.tokens == sum(map(len, [*alone, alone[3]]))
        assert report.drafted
    assert report.accepted == report.drafted  # its own guesses
    other.llama.config = replace(other.config, vocab_size=400)
    with pytest.raises(ValueError, match="speculate has a vocabulary of 400 tokens, expected 320"):
        ours.generate(prompts[0], speculate=other)
    with pytest.raises(ValueError, match="speculate is 'guess', expected None, 'lookup' or a model"):
        ours.generate(prompts[0], speculate="guess")
    with pytest.raises(TypeError, match="a text, chat messages, token ids, or a list of them"):
        ours.generate([prompts[0], "text"])


def test_a_step_that_pytorch_helps_with_is_not_replayed(tmp_path):
    from fastllm.generation.decode import DecodeStep

    save(ARCHITECTURES["llama"], tmp_path)
    llama = fastllm.load(tmp_path, weights="int8", group_size=32).llama  # embedding and head stay float
    cache = llama.new_cache(1, 8)
    step = DecodeStep(llama, cache)
    first = step([5]).clone()
    assert step._replay is None
    assert not torch.equal(step([6]), first)


class Graph:
    """What torch.cuda.CUDAGraph does, without a GPU: capture runs nothing that counts, replay repeats it into the same memory."""

    def __init__(self, step):
        self.step, self.replays, self.fails = step, 0, False

    def __enter__(self):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")

    def __exit__(self, *error):
        pass

    def replay(self):
        self.replays += 1
        self.logits = self.step._compute()
        if self.step._logits is not None and self.replays > 1:
            self.step._logits.copy_(self.logits)


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_on_a_gpu_is_captured_once_and_replayed(tmp_path, monkeypatch, fails):
    from fastllm.generation.decode import DecodeStep
    from fastllm.generation.prefill import prefill

    save(ARCHITECTURES["llama"], tmp_path)
    llama = fastllm.load(tmp_path).llama
    caches = [llama.new_cache(1, 60) for _ in range(2)]
    for cache in caches:
        with torch.inference_mode():
            prefill(llama, [ids_of(1, 9)[0].tolist()], cache)
    captured, computed = DecodeStep(llama, caches[0]), DecodeStep(llama, caches[1])
    computed._how = "_compute"
    captured._how = "_warm_up"
    graph = Graph(captured)
    graph.fails = fails
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda made: made)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for token in range(5, 11):
        assert torch.equal(captured([token]), computed([token]))
        for cache in caches:
            cache.lengths += 1
    assert graph.replays == (0 if fails else 5)


def test_a_forward_pass_stays_on_its_device(tmp_path, monkeypatch):
    """On a device without memory, each op giving what its fake gives: whatever met the CPU's memory would be refused, and whatever
    waited for a value would have none."""
    from fastllm.nn.cache import Places
    from fastllm.ops._op import Op
    from fastllm.quant import quantize

    monkeypatch.setattr(Op, "__call__", lambda self, *args: self.fake(*args))

    save(ARCHITECTURES["qwen3"], tmp_path)
    real = fastllm.load(tmp_path, weights="int4", group_size=32).llama

    def moved(value):
        if isinstance(value, list):
            return [moved(v) for v in value]
        if hasattr(value, "to"):
            return value.to("meta")
        fields = getattr(value, "__dataclass_fields__", {})
        return replace(value, **{k: moved(getattr(value, k)) for k in fields}) if fields else value

    table = moved(quantize(real.weights.embedding, 8, 32).pack())
    llama = Llama(real.config, replace(moved(real.weights), embedding=table), moved(real.rope))
    cache = llama.new_cache(2, 60)
    ids = torch.empty(2, 1, dtype=torch.int64, device=llama.device)
    places = Places(torch.empty_like(ids), torch.empty_like(ids[:, 0]), cache.capacity)
    for at in (None, places):
        logits = llama.head(llama.hidden_states(ids, cache, at))
        assert logits.device.type == "meta"
        assert logits.shape == (2, 1, real.config.vocab_size)
