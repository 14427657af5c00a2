"""What a call costs beside the kernel: tensors into C++ both ways, and the doors of an op.

    python benchmarks/boundary.py [--seconds 4] [--json FILE]

The kernel has nothing to do (no rows), so that what is left is the way to it. Contestants take turns; medians and 20th
percentiles. Take figures on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fastllm
from fastllm.backends import cpu_module, info
from fastllm.measure.timing import Timing, in_turns
from fastllm.ops.rms_norm import native

_cpu = cpu_module()
x, weight, residual, y, total = (torch.empty(shape) for shape in ((0, 64), (64,), (0, 64), (0, 64), (0, 64)))


@torch.library.custom_op("fastllm_benchmark::rms_norm", mutates_args=())
def custom_op(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return native.rms_norm(x, weight, None, eps, 0.0, True)


def two_tensors() -> None:
    _cpu.rms_norm(x, None, None, y, None, 1e-6, 0.0, True, 1)


def five_tensors() -> None:
    _cpu.rms_norm(x, weight, residual, y, total, 1e-6, 0.0, True, 1)


def by_attributes(call):
    def run() -> None:
        _cpu.use_exchange_api(False)
        for _ in range(100):
            call()
        _cpu.use_exchange_api(True)

    return run


def microseconds(timing: Timing, calls: int = 1) -> dict[str, float]:
    return {"median_us": timing.median * 1e6 / calls, "p20_us": timing.p20 * 1e6 / calls}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each table (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures here")
    options = parser.parse_args()

    def hundred(call):
        def run() -> None:
            for _ in range(100):
                call()

        return run

    ways = {
        "exchange API, 2 tensors": hundred(two_tensors),
        "exchange API, 5 tensors": hundred(five_tensors),
        "attributes, 2 tensors": by_attributes(two_tensors),
        "attributes, 5 tensors": by_attributes(five_tensors),
    }
    doors = {
        "torch.empty": lambda: torch.empty((0, 64)),
        "compiled module, called bare": lambda: _cpu.rms_norm(x, weight, None, y, None, 1e-6, 0.0, True, 1),
        "fastllm.rms_norm, direct door": lambda: fastllm.rms_norm(x, weight),
        "torch.ops.fastllm.rms_norm, registered door": lambda: torch.ops.fastllm.rms_norm(x, weight, None, 1e-6, 0.0, True),
        "the same as torch.library.custom_op": lambda: custom_op(x, weight, 1e-6),
        "torch.nn.functional.rms_norm": lambda: torch.nn.functional.rms_norm(x, (64,), weight, 1e-6),
    }
    figures: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        timed = in_turns(ways, [{}], seconds=options.seconds)
        figures.update({name: microseconds(timing, 100) for name, timing in timed.items()})
        timed = in_turns(doors, [{}], seconds=options.seconds)
        figures.update({name: microseconds(timing) for name, timing in timed.items()})
    for name, row in figures.items():
        print(f"{name:<46} {row['median_us']:>8.3f} us (20th percentile {row['p20_us']:.3f})")
    for way in ("exchange API", "attributes"):
        slope = (figures[f"{way}, 5 tensors"]["p20_us"] - figures[f"{way}, 2 tensors"]["p20_us"]) / 3
        print(f"{way:<46} {slope * 1e3:>8.0f} ns a tensor")
        figures[f"{way}, one tensor more"] = {"p20_us": slope}
    if options.json:
        Path(options.json).write_text(json.dumps({"figures": figures, "machine": info()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
