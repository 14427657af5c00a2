"""Which threads should run our kernels: PyTorch's own OpenMP runtime, or a pool of our own?

    python benchmarks/threads.py [--seconds 10] [--json FILE]

A model alternates PyTorch's ops with ours, a few microseconds each. Both runtimes run the same mixtures, in turns: on the
machine as it is, then beside a process that keeps one core busy. A mixture is 20 pairs of calls; figures are microseconds a
pair. Take them on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastllm.backends import cpu_module, info
from fastllm.measure.timing import in_turns, ratio

_cpu = cpu_module()
PAIRS = 20
# Sizes at which PyTorch and fastllm both use threads; at batch 1 most ops of a small model run on one.
x, weight = torch.randn(96, 2048), torch.ones(2048)
y, linear = torch.empty_like(x), torch.randn(256, 2048)
THREADS = torch.get_num_threads()


def ours() -> None:
    _cpu.rms_norm(x, weight, None, y, None, 1e-6, 0.0, True, THREADS)


def elementwise() -> Tensor:
    return torch.nn.functional.silu(y)


def matmul() -> Tensor:
    return torch.nn.functional.linear(y, linear)


MIXTURES = {
    "ours only": (ours, ours),
    "ours, torch silu": (ours, elementwise),
    "ours, torch linear": (ours, matmul),
}


def contestant(runtime, first, second):
    def run() -> None:
        _cpu.set_thread_runtime(runtime)
        for _ in range(PAIRS):
            first()
            second()

    return run


def measure(seconds: float) -> dict[str, dict[str, float]]:
    rows = {}
    for name, pair in MIXTURES.items():
        calls = {runtime: contestant(runtime, *pair) for runtime in ("openmp", "pool")}
        timed = in_turns(calls, [{}], seconds=seconds / len(MIXTURES))
        rows[name] = {f"{runtime}_us": timing.median * 1e6 / PAIRS for runtime, timing in timed.items()}
        rows[name] |= {f"{runtime}_p80_us": timing.p80 * 1e6 / PAIRS for runtime, timing in timed.items()}
        rows[name]["pool_over_openmp"] = ratio(timed["pool"], timed["openmp"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each of the two tables (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    if _cpu.thread_runtime() != "openmp":
        raise SystemExit("threads: this PyTorch has loaded no OpenMP runtime that could be shared: there is nothing to choose")
    figures = {}
    with torch.no_grad():
        figures["alone"] = measure(options.seconds)
        neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            figures["beside a busy process"] = measure(options.seconds)
        finally:
            neighbour.kill()
            neighbour.wait()
    for where, rows in figures.items():
        print(f"{where}, {THREADS} threads: microseconds a pair, median (80th percentile)")
        for name, row in rows.items():
            openmp, pool = (f"{row[f'{r}_us']:>7.1f} ({row[f'{r}_p80_us']:.1f})" for r in ("openmp", "pool"))
            print(f"  {name:<20} openmp {openmp:<18} pool {pool:<18} pool / openmp {row['pool_over_openmp']:.2f}")
    if options.json:
        Path(options.json).write_text(json.dumps({"figures": figures, "machine": info()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
