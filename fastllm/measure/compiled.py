"""Compiles the Triton kernels for GPUs that are not here, and reads what became of them: ``fastllm compile``.

A kernel that spills registers, wants more shared memory than the chip has, or multiplies without matrix instructions is
slow on every GPU of that kind, and none is needed to see it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import multiprocessing
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import ops
from ..errors import value_error
from ..ops._launch import GPU
from ..ops._triton import COMPILER, Build, interpreting

__all__ = ["TARGETS", "Compiled", "builds", "compile_all", "compile_one"]

TARGETS = {str(gpu): gpu for gpu in (GPU(8, 0), GPU(9, 0), GPU(10, 0), GPU(12, 0), GPU(9, 4, hip=True))}
MATRIX = r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma_\w+)"


@dataclass(frozen=True)
class Compiled:
    """What one launch became on one target.

    Args:
        registers: of a thread. spill_bytes: stored to and loaded from local memory because they ran out.
        shared_bytes: of a block. matrix: the matrix instructions found in the assembly, "" for none.
        ok: nothing spills, shared memory fits, and a launch that should multiply with matrix instructions does.
    """

    op: str
    launch: str
    target: str
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix: str
    ok: bool
    why: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def builds(target: str, names: Sequence[str] | None = None, quick: bool = False) -> list[tuple[str, Build]]:
    """(op, Build) of every op folder that has a ``triton.py``, or of the named ones, with that target's launch tables.

    ``quick`` keeps one launch of each table entry in 16 and in 32 bits: the first, of the plainest call.

    Raises: ValueError for an unknown target or a name that has none. NotImplementedError without Triton, or under its interpreter.
    """
    if importlib.util.find_spec("triton") is None:
        raise NotImplementedError("compile: Triton is not installed; `pip install triton` brings it")
    if interpreting():
        raise NotImplementedError(
            "compile: TRITON_INTERPRET is 1, expected unset, because interpreted kernels cannot be compiled"
        )
    gpu = _target(target)
    found = {}
    for module in pkgutil.iter_modules(ops.__path__):
        name = f"{ops.__name__}.{module.name}.triton"
        if module.ispkg and importlib.util.find_spec(name) is not None:
            found[module.name] = name
    for name in names or ():
        if name not in found:
            raise value_error("compile", "--op", name, "one of " + ", ".join(found))
    all_of_them = [
        (op, build)
        for op, path in found.items()
        if not names or op in names
        for build in importlib.import_module(path).builds(gpu)
    ]
    return list({_entry(build): (op, build) for op, build in reversed(all_of_them)}.values())[::-1] if quick else all_of_them


def _entry(build: Build) -> tuple[Any, ...]:
    of_what = next(kind for kind in build.signature.values() if kind.startswith("*")).replace("fp16", "bf16")
    return build.kernel, of_what, tuple(sorted(build.launch.items()))


def compile_all(targets: Sequence[str], names: Sequence[str] | None = None, quick: bool = False) -> Iterator[Compiled]:
    """Every launch for every target, in as many processes as there are cores. Raises as ``builds`` does."""
    tasks = [(target, names, quick, i) for target in targets for i in range(len(builds(target, names, quick)))]
    # Not forked: a process that has threads, as PyTorch's does, cannot be forked safely.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_compile_task, tasks)


def _compile_task(task: tuple[str, Sequence[str] | None, bool, int]) -> Compiled:
    target, names, quick, i = task
    op, build = _builds(target, None if names is None else tuple(names), quick)[i]
    return compile_one(op, build, target)


_builds = functools.cache(builds)


def _target(name: str) -> GPU:
    if name not in TARGETS:
        raise value_error("compile", "--target", name, "one of " + ", ".join(TARGETS))
    return TARGETS[name]


def compile_one(op: str, build: Build, target: str) -> Compiled:
    """Compiles one launch. Raises ValueError for an unknown target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    gpu = _target(target)
    limit = gpu.shared_bytes
    if gpu.hip:
        backend, chip = "hip", GPUTarget("hip", target, 64)
    else:
        backend, chip = "cuda", GPUTarget("cuda", 10 * gpu.major + gpu.minor, 32)
    arguments = build.kernel.arg_names
    signature = {name: build.signature.get(name, "constexpr") for name in arguments}
    given = {**build.constants, **build.launch}
    constants = {name: given.get(name) for name in arguments if name not in build.signature}
    divisible = [n for n in arguments if n in build.aligned or signature[n].startswith("*")]
    attributes = {(arguments.index(n),): [["tt.divisibility", 16]] for n in divisible if n in build.signature}
    source = ASTSource(build.kernel, signature, constants, attributes)
    options = {name: build.launch[name] for name in ("num_warps", "num_stages") if name in build.launch}
    try:
        kernel = triton.compile(source, target=chip, options={**options, **COMPILER})
    except Exception as error:  # of the compiler, whatever it is: a row says so and the others are still made
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        return Compiled(op, build.name, target, 0, 0, 0, 0, "", False, why)
    text = kernel.asm["ptx" if backend == "cuda" else "amdgcn"]
    registers, spilled = (_ptxas if backend == "cuda" else _amd)(text)
    matrix = ", ".join(sorted(set(re.findall(MATRIX, text))))
    shared = int(kernel.metadata.shared)
    warps = int(kernel.metadata.num_warps)  # more than were asked for where they have different work
    why = "; ".join(
        reason
        for wrong, reason in (
            (spilled > 0, f"{spilled} bytes of registers spill"),
            (shared > limit, f"{shared} bytes of shared memory, {limit} are there"),
            (build.matrix and not matrix, "no matrix instruction"),
        )
        if wrong
    )
    return Compiled(op, build.name, target, warps, registers, spilled, shared, matrix, not why, why)


def _ptxas(ptx: str) -> tuple[int, int]:
    """Registers and spilled bytes, as the assembler that comes with Triton tells them."""
    from triton.backends.nvidia.compiler import get_ptxas

    found = re.search(r"\.target (sm_(\d+)\w*)", ptx)
    assert found
    tool = get_ptxas(int(found[2]))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [tool.path, "-v", f"--gpu-name={found[1]}", str(file), "-o", str(file.with_suffix(".cubin"))]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stores, loads = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)[:2]
    used = re.search(r"Used (\d+) registers", log)
    return int(used[1]) if used else 0, int(stores) + int(loads)


def _amd(assembly: str) -> tuple[int, int]:
    """Vector registers and spilled bytes, from the kernel's metadata. Scalar registers spill into lanes of vector registers, which
    costs no memory: not counted."""

    def value(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    return value("vgpr_count"), 4 * value("vgpr_spill_count")
