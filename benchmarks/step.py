"""Where the time of a decode step goes: each kernel's share, what Python and PyTorch take around them, bytes a second.

    python benchmarks/step.py MODEL [--activations int8] [--cache int8] [--prompt 128] [--steps 64] [--json FILE]

Steps as they are served alternate with steps whose calls are timed one by one: what of such a step no call has is outside of kernels,
the clock that times them included. Figures are medians over the steps. Weights are counted once a step, scales included, in the share of the measured read bandwidth; that
is the best that was ever seen of a memory which others use too, so that a loop that does nothing but read has its turn after every
eighth step (the next one, which finds the caches full of it, does not count).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fastllm
from fastllm.backends import cpu_module, info
from fastllm.generation.decode import DecodeStep
from fastllm.generation.prefill import prefill
from fastllm.generation.sampling import first_maxima
from fastllm.measure.limits import limits
from fastllm.measure.report import write_json
from fastllm.pages import HugePages


def weight_bytes(llama) -> int:
    """That a step reads: every matrix once."""
    matrices = [matrix for layer in llama.weights.layers for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    return sum(matrix.nbytes for matrix in (*matrices, llama.weights.head))


class Reading:
    """Reads as much memory as a step does, at most 256 MiB, on all threads, and does nothing else."""

    def __init__(self, size: int) -> None:
        threads = torch.get_num_threads()
        floats = max(1, min(size, 256 << 20) // 4 // threads // 1024) * 1024
        self.rows, self.tiles = HugePages().zeros((threads, floats), torch.float32), torch.zeros(1024)
        self.rows.fill_(1.0)

    def bandwidth(self) -> float:
        """Bytes a second."""
        start = time.perf_counter()
        read = cpu_module().limit_loop("read", self.rows, self.rows, self.tiles, 1)
        return read / (time.perf_counter() - start)


@torch.inference_mode()
def measure(llama, prompt: int, steps: int) -> dict[str, object]:
    cache = llama.new_cache(1, prompt + 2 * steps + 1)
    token = int(prefill(llama, [[1] * prompt], cache)[0].argmax())
    step = DecodeStep(llama, cache)
    whole: list[float] = []
    outside: list[float] = []
    reading, reads = Reading(weight_bytes(llama)), []
    kernels = defaultdict(list)
    for i in range(2 * steps + 1):
        start = time.perf_counter()
        logits, calls = (step([token]), None) if i % 2 == 0 else step.timed([token])
        token = first_maxima(logits)[0]
        took = time.perf_counter() - start
        cache.lengths += 1
        if i == 0:  # the one that was recorded
            continue
        if calls is None:
            whole.append(took)
            if i % 16 == 0:
                reads.append(reading.bandwidth())
            continue
        if i % 16 == 1:
            continue
        for kernel in {name for name, _ in calls}:
            kernels[kernel].append(sum(seconds for name, seconds in calls if name == kernel))
        outside.append(1 - sum(seconds for _, seconds in calls) / took)
    total, busy = statistics.median(whole), sum(statistics.median(times) for times in kernels.values())
    read = weight_bytes(llama)
    return {
        "tok_s": 1 / total,
        "step_us": total * 1e6,
        "outside_kernels": statistics.median(outside),
        "kernels": {name: statistics.median(times) / busy for name, times in kernels.items()},
        "weights_gb_s": read / total / 1e9,
        "of_read_limit": read / total / (limits().read_memory * 1e9),
        "reading_gb_s": statistics.median(reads) / 1e9,
        "of_reading": read / total / statistics.median(reads),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="GGUF file, or Hugging Face directory")
    parser.add_argument("--activations", choices=("float", "int8"), default="int8")
    parser.add_argument("--cache", choices=("float32", "bfloat16", "float16", "int8"), default="float32")
    parser.add_argument("--prompt", type=int, default=128, help="tokens before the first step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=64, help="of each kind, at least 8 (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    if options.steps < 8:
        parser.error(
            f"--steps is {options.steps}, expected at least 8, because the reading has its turn after every eighth step"
        )
    context = options.prompt + 2 * options.steps + 1
    model = fastllm.load(
        options.model, activations=options.activations, cache_dtype=getattr(torch, options.cache), context=context
    )
    figures = measure(model.llama, options.prompt, options.steps)
    print(
        f"{figures['tok_s']:.1f} tokens/s, {figures['step_us']:.0f} us a step, {figures['outside_kernels']:.1%} of it outside kernels; "
        f"weights at {figures['weights_gb_s']:.1f} GB/s, {figures['of_read_limit']:.0%} of the read limit, "
        f"{figures['of_reading']:.0%} of what reading alone reached meanwhile ({figures['reading_gb_s']:.1f} GB/s)"
    )
    for name, share in sorted(figures["kernels"].items(), key=lambda item: -item[1]):
        print(f"  {name:<20}{share:6.1%}")
    if options.json:
        write_json(options.json, {**vars(options), **figures, "machine": info()})


if __name__ == "__main__":
    main()
