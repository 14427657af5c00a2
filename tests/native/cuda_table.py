"""Compiles every CUDA kernel for GPUs that are not here and reads what became of it: registers, spills, stack, instructions.

    python tests/native/cuda_table.py [--targets 80,90a,100a,120] [--json FILE] [kernel.cu ...]

A kernel that spills is slow on every GPU of that kind, and none is needed to see it. Fails for a spill, a stack, a vector kernel without
16-byte accesses, or one that should multiply matrices and has no such instruction.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
TARGETS = "80,90a,100a,120"
WIDE_LOAD = (
    r"ld\.global[.\w:]*\.v4\.(u32|b32|f32|s32)|ld\.global[.\w:]*\.v2\.(u64|b64|f64)|cp\.async[.\w]*\.shared\.global[^;]*, 16"
)
WIDE_STORE = r"st\.global[.\w]*\.v4\.(u32|b32|f32|s32)|st\.global[.\w]*\.v2\.(u64|b64|f64)"
# "kernel<template arguments> sm_90a" -> what its PTX must hold.
EXPECTED = [
    (r"^(rms_norm|gated_activation)_kernel<\w+, (4|8), .*false> ", {"16-byte loads": WIDE_LOAD, "16-byte stores": WIDE_STORE}),
    (
        r"^(rms_norm|gated_activation)_kernel<\w+, (4|8), .*true> ",  # to int8: a vector's integers, and a scale and a sum
        {"16-byte loads": WIDE_LOAD, "stores of whole groups": r"st\.global[.\w]*\.v2\.(f32|b32)"},
    ),
    (r"^(rms_norm|gated_activation)_kernel<\w+, 8, .*true> ", {"8-byte stores": r"st\.global[.\w]*\.v2\.(u32|b32)"}),
    (r"^rotary_kernel<\w+, (4|8), ", {"16-byte loads": WIDE_LOAD}),
    (
        r"^quant_product_kernel<FloatMath<bf16",
        {"16-byte loads": WIDE_LOAD, "bf16 product": r"mma\.sync\.[\w.]*m16n8k16[\w.]*\.bf16\.bf16"},
    ),
    (
        r"^quant_product_kernel<FloatMath<f16",
        {"16-byte loads": WIDE_LOAD, "fp16 product": r"mma\.sync\.[\w.]*m16n8k16[\w.]*\.f16\.f16"},
    ),
    (
        r"^quant_product_kernel<Int8Math",
        {"16-byte loads": WIDE_LOAD, "int8 product": r"mma\.sync\.[\w.]*m16n8k32[\w.]*\.s8\.s8"},
    ),
    (
        r"^attention_(decode|prefill)_kernel<",
        {"16-byte copies": WIDE_LOAD, "matrix instructions": r"mma\.sync\.aligned\.m16n8k16"},
    ),
    (r"^attention_prefill_kernel<", {"16-byte stores": WIDE_STORE}),
    (
        r"^attention_prefill_sm90_kernel<.* sm_90a$",  # empty for all others
        {
            "16-byte stores": WIDE_STORE,
            "wgmma": r"wgmma\.mma_async",
            "copies of boxes": r"cp\.async\.bulk\.tensor\.4d",
            "setmaxnreg": r"setmaxnreg\.inc",
        },
    ),
]


@dataclass(frozen=True)
class Kernel:
    """One instantiation on one target. Bytes are a thread's; why is empty where all is well."""

    file: str
    name: str
    target: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    matrix: str
    why: str


def nvcc(targets: str) -> str:
    """The compiler and flags that setup.py takes for them."""
    os.environ["FASTLLM_CUDA"] = targets.replace(",", " ")
    spec = importlib.util.spec_from_file_location("fastllm_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    sys.modules["fastllm_setup"] = setup  # its NamedTuple looks itself up there
    spec.loader.exec_module(setup)
    # The one inside its toolkit: what is on PATH may be a script beside no ptxas.
    return f"{setup.TOOLKIT.root / 'bin' / 'nvcc'} {setup.NVCC_FLAGS}"


def short(symbols: list[str]) -> list[str]:
    """rms_norm_kernel<bf16, 8, 4, 4> of what the compiler calls it."""
    names = subprocess.run(
        ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    names = [re.sub(r"fastllm::(cuda::)?|\(anonymous namespace\)::|^void |\((int|bool)\)", "", name) for name in names]
    return [re.sub(r"\([^()]*\)$", "", name) for name in names]


def compile_one(command: str, source: Path, target: str) -> Iterator[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        start = [*command.split(), "-I", str(ROOT / "csrc"), "-gencode", f"arch=compute_{target},code=compute_{target}"]
        run([*start, "-ptx", str(source), "-o", str(ptx)])
        assembler = str(Path(command.split(maxsplit=1)[0]).parent / "ptxas")
        said = run([assembler, "-v", f"-arch=sm_{target}", str(ptx), "-o", str(cubin)])
        text = ptx.read_text()
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)\n\}", text, re.S))
    facts = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        said,
        re.S,
    )
    for name, (symbol, stack, stores, loads, registers) in zip(short([f[0] for f in facts]), facts):
        matrix = ", ".join(sorted(set(re.findall(r"\b(mma\.sync\.aligned\.\w+|wgmma\.mma_async)", bodies[symbol]))))
        spilled = int(stores) + int(loads)
        problems = [f"{spilled} bytes of registers spill"] if spilled else []
        problems += [f"{stack} bytes of stack"] if int(stack) and not spilled else []
        for pattern, needed in EXPECTED:
            if re.search(pattern, f"{name} sm_{target}"):
                problems += [f"no {what}" for what, instruction in needed.items() if not re.search(instruction, bodies[symbol])]
        yield Kernel(source.name, name, f"sm_{target}", int(registers), spilled, int(stack), matrix, "; ".join(problems))


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"cuda_table: {' '.join(command)} failed:\n{done.stderr}")
    return done.stdout + done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="(default: all of csrc/cuda)")
    parser.add_argument("--targets", default=TARGETS, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the table here too")
    options = parser.parse_args()
    command = nvcc(options.targets)
    sources = [CUDA / name for name in options.files] or sorted(CUDA.glob("*.cu"))
    tasks = [(source, target) for source in sources for target in options.targets.split(",")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kernels = [k for found in pool.map(lambda task: list(compile_one(command, *task)), tasks) for k in found]
    width = max(len(k.name) for k in kernels)
    for k in kernels:
        print(f"{k.name:{width}} {k.target:8} {k.registers:3} registers  {k.matrix:32} {k.why or 'ok'}")
    if options.json:
        options.json.write_text(json.dumps([asdict(k) for k in kernels], indent=1) + "\n")
    wrong = [k for k in kernels if k.why]
    print(f"cuda_table: {len(kernels) - len(wrong)} of {len(kernels)} kernels as they should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
