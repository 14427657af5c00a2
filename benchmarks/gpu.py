"""Everything that waits for a GPU, in one run: `make gpu`.

    python benchmarks/gpu.py [--steps tests,verify,bench,tune] [--results benchmarks/results] [--seconds 0.3]

tests   the Triton kernels' tests, on the GPU
verify  every case against float64
bench   every model shape and the GPUs' own, beside PyTorch eager, torch.compile, SDPA's flash and cuDNN backends and
        Liger-Kernel (where installed, or in build/gpu, where `make gpu-rivals` puts it), with the share of this GPU's limits
tune    measures other launches than the shipped ones (not by default: it takes minutes)

Writes `<step>-<device>-<date>.json`. Where there is no GPU it says what it would do, and ends with status 0.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def steps(stem: str, results: Path, seconds: float) -> dict[str, list[str]]:
    fastllm = [sys.executable, "-m", "fastllm"]

    def file(step: str) -> list[str]:
        return ["--json", str(results / f"{step}-{stem}.json")]

    return {
        "tests": [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/test_triton.py",
            "tests/test_launch.py",
        ],
        "verify": [*fastllm, "verify", "--backend", "triton,torch", *file("verify")],
        "bench": [
            *(*fastllm, "bench", "--backend", "triton,torch", "--cold", "--rivals", "torch,compile,others"),
            *("--seconds", str(seconds), *file("bench")),
        ],
        "tune": [*fastllm, "tune", *file("tune")],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default="tests,verify,bench", help="(default: %(default)s)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", help="folder (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each row (default: %(default)s)")
    options = parser.parse_args()
    here = torch.cuda.get_device_name().replace(" ", "-").lower() if torch.cuda.is_available() else "DEVICE"
    known = steps(f"{here}-{date.today()}", options.results, options.seconds)
    wanted = options.steps.split(",")
    for step in wanted:
        if step not in known:
            parser.error(f"--steps: got {step}, expected {', '.join(known)}")
    if not torch.cuda.is_available():
        print(f"gpu: torch.cuda.is_available() is False, expected a GPU; with one, PyTorch {torch.__version__} would run")
        for step in wanted:
            print("   ", " ".join(known[step]))
        return 0
    rivals = [str(ROOT / "build/gpu"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, rivals))}
    failed = [step for step in wanted if subprocess.run(known[step], cwd=ROOT, env=environment, check=False).returncode]
    for step in failed:
        print("gpu: failed:", " ".join(known[step]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
