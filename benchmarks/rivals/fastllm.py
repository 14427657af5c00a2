"""fastllm itself, from the checkout: over the GGUF files, and with int8 rows of its own rounding."""

from __future__ import annotations

import math

from .common import Q4_0_BYTES, Q8_0_BYTES, SHAPES, Job, Tick, Variant, files_size, main

NAME, ENVIRONMENT = "fastllm", None  # None: the Python that runs the harness
VARIANTS = {
    f"{form}_{activations}": Variant(
        source=form,
        weights=f"int{bits}, group 32; {activations} activations, fp16 cache",  # as llama.cpp keeps it
        bits=bits,
        layer_bytes=size,
        head_bytes=size,
        settings={"activations": activations},
    )
    for form, bits, size in (("q4_0", 4, Q4_0_BYTES), ("q8_0", 8, Q8_0_BYTES))
    for activations in ("int8", "float")
}
# What GPTQ's checkpoints have by default, the head too; the group is the largest that divides the shape's rows.
# (135M's groups of 64 make its bytes, and its share of the read limit, 3 % more than is counted here.)
VARIANTS["int4_groups"] = Variant(
    source="hf",
    weights="int4, group 128 (135M: 64), symmetric; int8 activations, else bf16",
    bits=4,
    layer_bytes=0.5 + 2 / 128,
    head_bytes=0.5 + 2 / 128,
    in_pieces=True,
    settings={"activations": "int8", "weights": "int4", "head": "int4", "group_size": 128, "symmetric": True},
)
# What CTranslate2's and OpenVINO's int8 are: a scale a row.
VARIANTS["int8_rows"] = Variant(
    source="hf",
    weights="int8, a scale a row; int8 activations, else bf16",
    bits=8,
    layer_bytes=1.0,
    head_bytes=1.0,
    in_pieces=True,
    settings={"activations": "int8", "weights": "int8", "head": "int8", "group_size": -1},
)


class FastLLM:
    def __init__(self, job: Job) -> None:
        import torch

        import fastllm

        torch.set_num_threads(job.threads)
        torch.set_grad_enabled(False)
        variant = VARIANTS[job.variant]
        stored = variant.source != "hf"
        path = job.model / (f"{variant.source}.gguf" if stored else "hf")
        self.weights_bytes = path.stat().st_size if stored else files_size(path, "*.safetensors")
        dtypes = {"cache_dtype": torch.float16} if stored else {"dtype": torch.bfloat16}
        settings = dict(variant.settings)
        if settings.get("group_size", -1) > 0:
            settings["group_size"] = math.gcd(settings["group_size"], SHAPES[job.shape].hidden_size)
        self.llama = fastllm.load(path, context=job.capacity, tokenizer=False, **dtypes, **settings).llama

    def generate(self, prompts: list[list[int]], new_tokens: int, tick: Tick) -> list[list[int]]:
        from fastllm.generation.decode import DecodeStep
        from fastllm.generation.prefill import prefill
        from fastllm.generation.sampling import first_maxima

        cache = self.llama.new_cache(len(prompts), len(prompts[0]) + new_tokens)
        steps = [first_maxima(prefill(self.llama, prompts, cache))]
        tick()
        step = DecodeStep(self.llama, cache)
        for _ in range(new_tokens):
            steps.append(first_maxima(step(steps[-1])))
            cache.lengths += 1
            tick()
        self.llama.give_back(cache)  # as fastllm's own loop does
        return [list(tokens) for tokens in zip(*steps)]


if __name__ == "__main__":
    main(FastLLM, ("fastllm", "torch"))
