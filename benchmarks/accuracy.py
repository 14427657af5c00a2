"""What each way to run a quantised model costs in accuracy, beside its speed: perplexity and KL on the real model.

    python benchmarks/accuracy.py [MODEL] [--tokens 2048] [--json FILE]

The same stored weights every time; the last rows have them rounded again, in bf16, as `fastllm.load` rounds a float checkpoint: to
int8 with a scale a row, to symmetric int4 in groups. Each row is compared with float activations and an fp32 cache, which
`fastllm demo` compares with transformers in fp32. The text is fastllm/data/factbook.txt, in independent windows of 512 tokens.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from importlib.resources import files
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fastllm
from fastllm.backends import info
from fastllm.evaluation.quality import agreement, losses_of, perplexity, windows
from fastllm.measure.report import write_json
from fastllm.models.llama import Llama
from fastllm.models.real_model import find
from fastllm.quant import QuantizedTensor, quantize

CACHES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
WINDOW = 512
# Bits and group size; 64 is the largest group that divides the real model's 576 columns.
ROUNDED = {"int8 rows": (8, -1), "int4 of 32": (4, 32), "int4 of 64": (4, 64)}


def rounded_again(llama: Llama, bits: int, group_size: int) -> Llama:
    """What ``fastllm.load(..., dtype=torch.bfloat16, weights=, head=, group_size=, symmetric=True)`` makes of float weights."""

    def rounded(weight):
        if isinstance(weight, QuantizedTensor):
            return quantize(weight.dequantize(torch.float32), bits, group_size, symmetric=True).pack()
        return weight if weight is None else weight.to(torch.bfloat16)

    def all_of(values):
        return replace(values, **{f.name: rounded(getattr(values, f.name)) for f in fields(values) if f.name != "layers"})

    weights = replace(all_of(llama.weights), layers=[all_of(layer) for layer in llama.weights.layers])
    return Llama(llama.config, weights, llama.rope, dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="GGUF file, or Hugging Face directory (default: the real model of the tests)")
    parser.add_argument("--tokens", type=int, default=2048, help="of the text (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    path = Path(options.model or find())
    model = fastllm.load(path, context=WINDOW)
    text = files("fastllm").joinpath("data/factbook.txt").read_text(encoding="utf-8")
    texts = windows(model.tokenizer.encode(text, add_special_tokens=False), WINDOW, options.tokens)
    trusted = [model.logits(ids)[0] for ids in texts]
    rows = []
    stored = model.llama
    again = {name: rounded_again(stored, *form) for name, form in ROUNDED.items()}
    modes = [("stored", activations, cache) for activations in ("float", "int8") for cache in CACHES]
    print(
        f"{'weights':<12}{'activations':<14}{'cache':<10}{'perplexity':>11}{'mean KL, nats':>15}{'top-1':>9}{'worst logit':>13}"
    )
    for weights, activations, cache in [*modes, *((name, "int8", torch.bfloat16) for name in again)]:
        model.llama = again.get(weights, stored)
        model.llama.activations, model.llama.cache_dtype = activations, cache
        ours = [model.logits(ids)[0].float() for ids in texts]
        rest = iter(ours)
        found = {
            "weights": weights,
            "activations": activations,
            "cache": str(cache).removeprefix("torch."),
            "perplexity": perplexity(losses_of(lambda ids, rest=rest: next(rest)[None]), texts),
            **agreement(iter(trusted), iter(ours)).as_dict(),
        }
        rows.append(found)
        print(
            f"{weights:<12}{activations:<14}{found['cache']:<10}{found['perplexity']:>11.3f}{found['mean_kl']:>15.1e}"
            f"{found['top1']:>9.2%}{found['max_logit_error']:>13.3f}",
            flush=True,
        )
    if options.json:
        kept = {"model": path.name, "tokens": options.tokens, "window": WINDOW, "rows": rows}
        write_json(options.json, {**kept, "machine": info()})


if __name__ == "__main__":
    main()
