"""Everything that waits for a GPU, in one run: `make gpu`.

    python benchmarks/gpu.py [--steps build,tests,sanitizer,verify,bench,model,tune] [--results benchmarks/results] [--seconds 0.3]

build   fastllm._cpu and fastllm._cuda, in place, with the nvcc and the compiler that are found
tests   the CUDA and Triton kernels' tests, on the GPU
sanitizer  the CUDA kernels' tests under compute-sanitizer: memcheck, racecheck
verify  every case against float64
bench   every model shape and the GPUs' own, beside PyTorch eager, torch.compile, SDPA's flash and cuDNN backends, PyTorch's
        int4 and int8 products and Liger-Kernel (where installed, or in build/gpu, where `make gpu-rivals` puts it), with the
        share of this GPU's limits
model   decode steps of made-up models in Llama's shapes, captured in CUDA graphs (benchmarks/gpu_step.py)
tune    measures other launches than the shipped ones (not by default: it takes minutes)

Writes `<step>-<device>-<date>.json`. Where there is no GPU it says what it would do, and ends with status 0.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def steps(stem: str, results: Path, seconds: float) -> dict[str, list[list[str]]]:
    fastllm = [sys.executable, "-m", "fastllm"]

    def file(step: str) -> list[str]:
        return ["--json", str(results / f"{step}-{stem}.json")]

    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    backends = ["--backend", "cuda,triton,torch"]
    return {
        "build": [[sys.executable, "setup.py", "-q", "build_ext", "--inplace"]],
        "tests": [[*tests, "tests/test_cuda.py", "tests/test_triton.py", "tests/test_launch.py"]],
        # One dtype and the shorter shapes: the tools slow kernels down some hundred times.
        "sanitizer": [
            [
                "compute-sanitizer",
                "--tool",
                tool,
                "--error-exitcode",
                "1",
                *tests,
                "tests/test_cuda.py",
                "-k",
                "bfloat16 and not llama",
            ]
            for tool in ("memcheck", "racecheck")
        ],
        "verify": [[*fastllm, "verify", *backends, *file("verify")]],
        "bench": [
            [
                *(*fastllm, "bench", *backends, "--cold", "--rivals", "torch,compile,others"),
                *("--seconds", str(seconds), *file("bench")),
            ]
        ],
        "model": [[sys.executable, "-m", "benchmarks.gpu_step", *file("model")]],
        "tune": [[*fastllm, "tune", *file("tune")]],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default="build,tests,sanitizer,verify,bench,model", help="(default: %(default)s)")
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
            for command in known[step]:
                print("   ", " ".join(command))
        return 0
    rivals = [str(ROOT / "build/gpu"), os.environ.get("PYTHONPATH", "")]
    number = "{}{}".format(*torch.cuda.get_device_capability())
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, rivals)),
        "FASTLLM_CUDA": number + ("a" if number in ("90", "100") else ""),  # as PyTorch sees it: nvidia-smi may be missing
    }
    failed = []
    for step in wanted:
        for command in known[step]:
            if shutil.which(command[0]) is None:
                print(f"gpu: {command[0]} is not on PATH, so {step} is left out")
            elif subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
                failed.append(command)
    for command in failed:
        print("gpu: failed:", " ".join(command))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
