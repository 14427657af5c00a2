"""llama.cpp, through the C interface that llama-cpp-python binds, built for this CPU."""

from __future__ import annotations

from typing import Any

from .common import Q4_0_BYTES, Q8_0_BYTES, SHAPES, Job, Tick, Variant, main

NAME, ENVIRONMENT = "llama.cpp", "llama_cpp"
VARIANTS = {
    "q4_0": Variant("q4_0", "Q4_0", 4, Q4_0_BYTES, Q4_0_BYTES),
    "q8_0": Variant("q8_0", "Q8_0", 8, Q8_0_BYTES, Q8_0_BYTES),
}
CHUNK = 512  # tokens a call, its default


class LlamaCpp:
    def __init__(self, job: Job) -> None:
        import numpy as np

        self.np, self.api = np, self.load_api()
        path = job.model / f"{job.variant}.gguf"
        self.weights_bytes = path.stat().st_size
        self.api.llama_backend_init()
        model = self.api.llama_model_load_from_file(str(path).encode(), self.model_options())
        self.context = self.api.llama_init_from_model(model, self.context_options(job))
        if not self.context:
            raise RuntimeError(f"{path} could not be loaded")
        self.vocab = SHAPES[job.shape].vocab_size
        self.batch = self.api.llama_batch_init(CHUNK, 0, 1)

    def load_api(self) -> Any:
        import llama_cpp

        return llama_cpp

    def model_options(self) -> Any:
        return self.api.llama_model_default_params()

    def context_options(self, job: Job) -> Any:
        options = self.api.llama_context_default_params()
        options.n_ctx, options.n_seq_max = job.capacity * job.batch, job.batch
        options.n_batch = options.n_ubatch = CHUNK
        options.n_threads = options.n_threads_batch = job.threads
        return options

    def decode(self, tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """(token, position, sequence, whether its logits are wanted) -> the greedy tokens of those that are."""
        api, batch = self.api, self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if status := api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        rows = [api.llama_get_logits_ith(self.context, i) for i, token in enumerate(tokens) if token[3]]
        return [int(self.np.ctypeslib.as_array(row, (self.vocab,)).argmax()) for row in rows]

    def clear(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def generate(self, prompts: list[list[int]], new_tokens: int, tick: Tick) -> list[list[int]]:
        self.clear()
        found = []
        for sequence, prompt in enumerate(prompts):
            last = len(prompt) - 1
            for start in range(0, len(prompt), CHUNK):
                part = enumerate(prompt[start : start + CHUNK], start)
                next_token = self.decode([(token, at, sequence, at == last) for at, token in part])
            found.append(next_token)
        tick()
        for at in range(len(prompts[0]), len(prompts[0]) + new_tokens):
            step = self.decode([(tokens[-1], at, sequence, True) for sequence, tokens in enumerate(found)])
            for tokens, token in zip(found, step):
                tokens.append(token)
            tick()
        return found


if __name__ == "__main__":
    main(LlamaCpp, ("llama-cpp-python",))
