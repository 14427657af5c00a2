"""Decode steps of a made-up model on a GPU: tokens a second, and the share of the GPU's bandwidth at which weights are read.

    python -m benchmarks.gpu_step [--shapes 1b 8b] [--weights bf16 int4] [--prompt 128] [--steps 64] [--device cuda] [--json FILE]

Weights are random, in a real model's shapes, made on the device; int4 has groups of 128 columns. A step is the thin model's,
captured in a CUDA graph and replayed; its time is from its ids on the CPU to its logits on the GPU. Weights are counted once a
step, scales included. `--device cpu` is for trying the script.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rivals.common import SHAPES, Shape
from benchmarks.step import weight_bytes
from fastllm.generation.decode import DecodeStep
from fastllm.generation.prefill import prefill
from fastllm.measure.limits import gpu_limits, limits
from fastllm.measure.report import write_json
from fastllm.models.llama import Layer, Llama, Weights
from fastllm.models.loaders import ModelConfig
from fastllm.nn.rope import rope_tables
from fastllm.quant import QuantizedTensor

GROUP = 128
# By name: bits of the matrices, and what they see.
WEIGHTS = {"bf16": (None, "float"), "int8": (8, "float"), "int4": (4, "float"), "int4-int8": (4, "int8")}


def config_of(shape: Shape) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_layers=shape.num_hidden_layers,
        num_heads=shape.num_attention_heads,
        num_kv_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_positions=shape.max_position_embeddings,
        rms_norm_eps=shape.rms_norm_eps,
        rope_theta=shape.rope_theta,
        rope_scaling=None,
        rotary_dim=shape.head_dim,
        sliding_window=None,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tie_embeddings=shape.tie_word_embeddings,
        bos_token_id=None,
        eos_token_ids=(),
        hidden_act="silu",
    )


def made_up(shape: Shape, weights: str, device: str) -> Llama:
    """A model whose matrices hold anything; integers are drawn as they lie in memory."""
    bits, activations = WEIGHTS[weights]

    def matrix(n: int, k: int) -> Any:
        if bits is None:
            return torch.randn(n, k, device=device, dtype=torch.bfloat16).mul_(k**-0.5)
        blocks, lines = -(-n // 16), k * bits // 32
        data = torch.randint(0, 256, (blocks, lines, 64), device=device, dtype=torch.uint8)
        scale = torch.full((blocks, k // GROUP, 16), 2.0 ** (1 - bits) * k**-0.5, device=device, dtype=torch.float16)
        return QuantizedTensor(data, scale, None, 1 << (bits - 1), (n, k), bits, GROUP, "x16")

    config = config_of(shape)
    hidden, heads = config.hidden_size, config.num_heads * config.head_dim
    ones = torch.ones(hidden, device=device, dtype=torch.bfloat16)
    layers = [
        Layer(
            attention_norm=ones,
            qkv=matrix(heads + 2 * config.num_kv_heads * config.head_dim, hidden),
            qkv_bias=None,
            q_norm=None,
            k_norm=None,
            o=matrix(hidden, heads),
            mlp_norm=ones,
            gate_up=matrix(2 * config.intermediate_size, hidden),
            down=matrix(hidden, config.intermediate_size),
        )
        for _ in range(config.num_layers)
    ]
    embedding = torch.randn(config.vocab_size, hidden, device=device, dtype=torch.bfloat16)
    model = Weights(embedding, layers, ones, matrix(config.vocab_size, hidden))
    tables = rope_tables(
        head_dim=config.head_dim, rope_theta=config.rope_theta, max_positions=shape.max_position_embeddings, device=device
    )
    return Llama(config, model, tables, dtype=torch.bfloat16, activations=activations)


@torch.inference_mode()
def measure(shape: Shape, weights: str, device: str, prompt: int, steps: int) -> dict[str, Any]:
    llama = made_up(shape, weights, device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    cache = llama.new_cache(1, prompt + steps + 3)
    prefill(llama, [[1] * prompt], cache)
    step, times = DecodeStep(llama, cache), []
    for _ in range(steps + 3):  # the first compiles, the second captures
        wait()
        start = time.perf_counter()
        step([1])
        wait()
        times.append(time.perf_counter() - start)
        cache.lengths += 1
    took, read = statistics.median(times[3:]), weight_bytes(llama)
    limit = gpu_limits().copy if device == "cuda" else limits().read_memory
    return {
        "model": shape.title,
        "weights": weights,
        "prompt": prompt,
        "replayed": step._replay is not None,
        "tok_s": 1 / took,
        "step_us": took * 1e6,
        "weights_gb_s": read / took / 1e9,
        "of_limit": read / took / (limit * 1e9),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1b", "8b"])
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--prompt", type=int, default=128, help="tokens before the first step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    rows = []
    for shape in options.shapes:
        for weights in options.weights:
            row = measure(SHAPES[shape], weights, options.device, options.prompt, options.steps)
            rows.append(row)
            how = "replayed" if row["replayed"] else "NOT replayed"
            print(
                f"{row['model']} {weights}: {row['tok_s']:.1f} tokens/s, {row['step_us']:.0f} us a step, {how}; weights at "
                f"{row['weights_gb_s']:.0f} GB/s, {row['of_limit']:.0%} of the limit"
            )
    if options.json:
        write_json(options.json, {**vars(options), "rows": rows, "torch": torch.__version__})


if __name__ == "__main__":
    main()
