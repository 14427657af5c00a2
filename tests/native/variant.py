"""Builds a variant of the compiled modules and runs Python on it: sanitized, with AVX-512 emulated, with CUDA's kernels compiled
by nvcc, or for the executor in tests/simt (sanitized too).

    python tests/native/variant.py sanitize -m pytest -q tests/test_ops.py
    python tests/native/variant.py emulate -m fastllm verify --isa avx512_vnni
    python tests/native/variant.py simt -m fastllm verify --backend cuda

The variant is a directory, build/<variant>/package, that holds links to the Python files of fastllm/ beside the variant's
own _cpu module; it stands first on the module path of the Python that is started. Paths are the repository's: the
variant sees the same tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
BUILD = {
    # Optimised less than the real thing: the checks, not the speed, are what it is for; and it compiles in half the time.
    "sanitize": {"FASTLLM_CXXFLAGS": f"{SANITIZERS} -O1", "FASTLLM_CUDA": "0"},
    "emulate": {"FASTLLM_EMULATE": "1", "FASTLLM_CUDA": "0"},
    "cuda": {"FASTLLM_CUDA": "80"},  # by nvcc, for one kind of GPU: to import where there is none
    "simt": {"FASTLLM_CUDA": "simt"},
    "simt_sanitize": {"FASTLLM_CXXFLAGS": f"{SANITIZERS} -O1", "FASTLLM_CUDA": "simt"},
}


def compiler_file(name: str) -> str:
    compiler = os.environ.get("CXX", "c++")
    return subprocess.run([compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()


def run_environment(variant: str) -> dict[str, str]:
    if not variant.endswith("sanitize"):
        return {}
    # The sanitizer's runtime has to be there before Python is. Leaks: Python and PyTorch keep theirs on purpose.
    # An allocation that the system refuses is for the program to report, as it is without the sanitizer.
    return {
        "LD_PRELOAD": f"{compiler_file('libasan.so')}:{compiler_file('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:strict_string_checks=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def build(variant: str) -> Path:
    """The directory to put on the module path."""
    work = ROOT / "build" / variant
    package = work / "package" / "fastllm"
    package.mkdir(parents=True, exist_ok=True)
    for link in package.iterdir():
        if link.is_symlink():
            link.unlink()
    for file in (ROOT / "fastllm").iterdir():
        if file.suffix != ".so" and file.name != "__pycache__":
            (package / file.name).symlink_to(file)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(package.parent)]
    if variant.endswith("sanitize"):  # the others share the real build's objects but for their own
        command += ["--build-temp", str(work / "temp")]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **BUILD[variant]}, check=True)
    return package.parent


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in BUILD:
        raise SystemExit(f"usage: python {sys.argv[0]} {'|'.join(BUILD)} [arguments of python]")
    variant, arguments = sys.argv[1], sys.argv[2:]
    package = build(variant)
    if not arguments:
        return 0
    # `python -m` puts the working directory before everything else, so that is where the variant has to be.
    # A module's name is no path, though fastllm/ is there.
    before = ["", *arguments]
    arguments = [
        str(ROOT / a) if b != "-m" and (ROOT / a.partition("::")[0]).exists() else a for a, b in zip(arguments, before)
    ]
    if "pytest" in arguments[:2]:
        arguments += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    environment = {**os.environ, **run_environment(variant), "PYTHONPATH": str(package)}
    return subprocess.run([sys.executable, *arguments], check=False, cwd=package, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
