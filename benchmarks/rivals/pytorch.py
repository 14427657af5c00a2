"""Hugging Face transformers on PyTorch: eager, under torch.compile, and with torchao's quantised weights."""

from __future__ import annotations

from typing import Any

from .common import Job, Tick, Variant, main

NAME, ENVIRONMENT = "PyTorch", "pytorch"
VARIANTS = {
    "eager_fp32": Variant("hf", "fp32", 32, 4, 4, settings={"dtype": "float32"}),
    "eager_bf16": Variant("hf", "bf16", 16, 2, 2, settings={"dtype": "bfloat16"}),
    "compile_fp32": Variant("hf", "fp32, torch.compile", 32, 4, 4, settings={"dtype": "float32", "compile": True}),
    "compile_bf16": Variant("hf", "bf16, torch.compile", 16, 2, 2, settings={"dtype": "bfloat16", "compile": True}),
    "torchao_int8": Variant(
        "hf", "torchao int8 rows, torch.compile", 8, 1, 1, settings={"dtype": "bfloat16", "compile": True, "torchao": "int8"}
    ),
    "torchao_int4": Variant(  # bf16 scale and zero point a group
        "hf", "torchao int4, group 32, torch.compile", 4, 20 / 32, 20 / 32,
        settings={"dtype": "bfloat16", "compile": True, "torchao": "int4"},
    ),
}  # fmt: skip


class Transformers:
    def __init__(self, job: Job) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(job.threads)
        torch.set_grad_enabled(False)
        settings = VARIANTS[job.variant].settings
        folder = job.model / "hf"
        self.weights_bytes = (folder / "model.safetensors").stat().st_size
        dtype = getattr(torch, settings["dtype"])
        self.torch, self.transformers = torch, transformers
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
        if "torchao" in settings:
            self.quantise(settings["torchao"])
        self.step: Any = self.model
        self.caches: dict[int, Any] = {}
        self.capacity = job.capacity
        self.compiled = settings.get("compile", False)
        if self.compiled:
            self.step = torch.compile(self.model.forward, dynamic=False)

    def quantise(self, kind: str) -> None:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        if kind == "int8":
            config: Any = Int8WeightOnlyConfig()
        else:  # the layout that its CPU kernels read is not among the released ones
            from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

            config = PrototypeInt4WeightOnlyConfig(group_size=32)
        head = self.model.lm_head
        head.weight = self.torch.nn.Parameter(head.weight.clone(), requires_grad=False)  # the embedding stays in bf16
        quantize_(self.model, config)

    def cache(self, batch: int) -> Any:
        """A compiled step wants memory that stays where it is; eager code its default, which grows."""
        if not self.compiled:
            return self.transformers.DynamicCache(config=self.model.config)
        if batch not in self.caches:
            self.caches[batch] = self.transformers.StaticCache(config=self.model.config, max_cache_len=self.capacity)
        self.caches[batch].reset()
        return self.caches[batch]

    def generate(self, prompts: list[list[int]], new_tokens: int, tick: Tick) -> list[list[int]]:
        torch, cache, position = self.torch, self.cache(len(prompts)), 0
        ids, found = torch.tensor(prompts), []
        for _ in range(new_tokens + 1):
            end = position + ids.shape[1]
            forward = self.step if position else self.model  # like generate(): prompts come in too many lengths to compile each
            out = forward(
                input_ids=ids, position_ids=torch.arange(position, end)[None], past_key_values=cache, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
            ids, position = out.logits[:, -1].argmax(-1, keepdim=True), end
            found.append(ids[:, 0].tolist())
            tick()
        return [list(tokens) for tokens in zip(*found)]


if __name__ == "__main__":
    main(Transformers, ("torch", "transformers", "torchao"))
