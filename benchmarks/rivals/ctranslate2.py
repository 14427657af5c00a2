"""CTranslate2's Generator, int8 weights and activations."""

from __future__ import annotations

import json

from .common import Job, Tick, Variant, convert, files_size, main

NAME, ENVIRONMENT = "CTranslate2", "ctranslate2"
VARIANTS = {
    "int8": Variant("hf", "int8 rows; int8 activations", 8, 1, 1),
    # It decodes faster with one thread than with two on some machines.
    "int8_1_thread": Variant("hf", "int8 rows; int8 activations", 8, 1, 1, threads=1),
}


class CTranslate2:
    def __init__(self, job: Job) -> None:
        import ctranslate2

        folder = convert(job, "ctranslate2-int8", [
            "bin/ct2-transformers-converter", "--model", "{source}", "--output_dir", "{target}", "--quantization", "int8",
        ])  # fmt: skip
        self.weights_bytes = files_size(folder, "model.bin")
        self.generator = ctranslate2.Generator(
            str(folder), device="cpu", compute_type="int8", inter_threads=1, intra_threads=job.threads
        )
        self.words = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))

    def generate(self, prompts: list[list[int]], new_tokens: int, tick: Tick) -> list[list[int]]:
        calls = 0

        def called(_: object) -> bool:
            nonlocal calls
            calls += 1  # once a sequence
            if calls % len(prompts) == 0:
                tick()
            return False  # go on

        results = self.generator.generate_batch(
            [[self.words[i] for i in prompt] for prompt in prompts],
            max_length=new_tokens + 1, min_length=new_tokens + 1, beam_size=1, sampling_topk=1, end_token=[],
            include_prompt_in_result=False, callback=called,
        )  # fmt: skip
        return [result.sequences_ids[0] for result in results]


if __name__ == "__main__":
    main(CTranslate2, ("ctranslate2",))
