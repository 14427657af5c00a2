"""onnxruntime-genai, int4 weights."""

from __future__ import annotations

import json

from .common import Job, Tick, Variant, convert, files_size, main

NAME, ENVIRONMENT = "onnxruntime-genai", "onnxruntime"
VARIANTS = {
    # An fp32 scale a group of 32; accuracy level 4 lets its kernels round activations to int8, which is its fast way.
    "int4": Variant("hf", "int4, group 32; int8 activations", 4, 20 / 32, 20 / 32),
}


class OnnxRuntime:
    def __init__(self, job: Job) -> None:
        import numpy as np
        import onnxruntime_genai as api

        folder = convert(job, "onnxruntime-int4", [
            "bin/python", "-m", "onnxruntime_genai.models.builder", "-i", "{source}", "-o", "{target}", "-p", "int4", "-e", "cpu",
            "-c", "{cache}", "--extra_options", "int4_accuracy_level=4",
        ])  # fmt: skip
        self.weights_bytes = files_size(folder, "model.onnx*")
        config = api.Config(str(folder))
        options = {"session_options": {"intra_op_num_threads": job.threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self.api, self.np, self.model = api, np, api.Model(config)

    def generate(self, prompts: list[list[int]], new_tokens: int, tick: Tick) -> list[list[int]]:
        length = len(prompts[0]) + new_tokens + 1
        options = self.api.GeneratorParams(self.model)
        options.set_search_options(max_length=length, min_length=length, batch_size=len(prompts), do_sample=False)
        generator = self.api.Generator(self.model, options)
        generator.append_tokens(self.np.array(prompts, self.np.int32))
        for _ in range(new_tokens + 1):
            generator.generate_next_token()
            tick()
        return [generator.get_sequence(i)[len(prompts[0]) :].tolist() for i in range(len(prompts))]


if __name__ == "__main__":
    main(OnnxRuntime, ("onnxruntime-genai", "onnxruntime"))
