"""Everything that waits for a GPU, in one run: `make gpu`.

    python benchmarks/gpu.py [--results benchmarks/results] [--seconds 0.3]

Runs the Triton kernels' tests on the GPU, verifies every case, benchmarks every model shape beside PyTorch and torch.compile, and
writes one file of rows, `<device>-<date>.json`. Where there is no GPU it says what it would do, and ends with status 0.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", help="folder (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each row (default: %(default)s)")
    options = parser.parse_args()
    here = torch.cuda.get_device_name().replace(" ", "-").lower() if torch.cuda.is_available() else "DEVICE"
    stem = f"{here}-{date.today()}"
    fastllm = [sys.executable, "-m", "fastllm"]
    steps = [
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_triton.py"],
        [*fastllm, "verify", "--backend", "triton", "--json", str(options.results / f"verify-{stem}.json")],
        [
            *fastllm,
            "bench",
            "--backend",
            "triton",
            "--seconds",
            str(options.seconds),
            "--json",
            str(options.results / f"{stem}.json"),
        ],
    ]
    if not torch.cuda.is_available():
        print(f"gpu: torch.cuda.is_available() is False, expected a GPU; with one, PyTorch {torch.__version__} would run")
        for step in steps:
            print("   ", " ".join(step))
        return 0
    failed = [step for step in steps if subprocess.run(step, cwd=ROOT, check=False).returncode]
    for step in failed:
        print("gpu: failed:", " ".join(step))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
