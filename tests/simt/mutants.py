"""Wrong variants of the CUDA kernels, each of which must fail: a line of a source, and what stands there instead.

Only what the line changes is compiled again, with the executor build's own commands (`python tests/native/variant.py simt` makes it).
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import ninja

from . import mutants_attention as attention
from . import mutants_quant_matmul as quant_matmul

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"


class Mutant(NamedTuple):
    file: str  # of csrc/cuda
    what: str
    line: str  # found in it once
    wrong: str
    cases: str  # words that the names of the cases hold which are to catch it, "rms_norm and residual"


MUTANTS = [
    Mutant("rms_norm.cu", "no eps", "/ static_cast<double>(K) + a.eps", "/ static_cast<double>(K)", "rms_norm and tiny"),
    Mutant("rms_norm.cu", "the residual is not added", "h.at[i] += r.at[i];", ";", "rms_norm and residual"),
    Mutant("rms_norm.cu", "a row's tail is not summed", "add_squares(load_sum(k));", ";", "rms_norm and 20011"),
    Mutant("rms_norm.cu", "the offset is not added", "w.at[i] + a.offset", "w.at[i]", "rms_norm and gemma"),
    Mutant("reduce.cuh", "sums are read before all are there", "    __syncthreads();\n", "", "rms_norm and 576"),
    Mutant("reduce.cuh", "a warp's last step is left out", "distance > 0", "distance > 1", "rms_norm and 131"),
    Mutant("gated_activation.cu", "silu for gelu", "a.gelu_tanh ?", "false ?", "gated_activation and gelu"),
    Mutant("gated_activation.cu", "the second vector is the first", "first + v * kThreads * kVec;\n    if (i < a.I)", "first;\n    if (i < a.I)", "gated_activation"),
    Mutant("rotary.cu", "sine's sign", "left * cos_left - right * sin_left", "left * cos_left + right * sin_left", "rotary"),
    Mutant("rotary.cu", "halves for neighbours", "a.interleaved && kVec > 1", "false && kVec > 1", "rotary and interleaved"),
    Mutant("rotary.cu", "the rest of the lanes is not copied", "(a.D - turned) / kVec", "0", "rotary"),
    Mutant("rotary.cu", "the slot is its neighbour", "t * a.slots_strides[1]] : t", "t * a.slots_strides[1]] ^ 1 : t", "rotary_cache"),
    Mutant("rotary.cu", "a page's row is its neighbour", "slot %= a.page;", "slot = (slot + 1) % a.page;", "rotary_cache and pages"),
    Mutant("rotary.cu", "an int8 row's step is a lane's own", "largest = reduce_lanes<kLanes>(largest, Largest());", "", "rotary_cache and int8"),
]  # fmt: skip
MUTANTS += [Mutant(*m) for m in (*attention.MUTANTS, *quant_matmul.MUTANTS)]


def build(mutant: Mutant, folder: Path) -> ModuleType:
    """fastllm._cuda with the mutant in it, beside the one that is loaded."""
    text = (SOURCES / mutant.file).read_text()
    assert text.count(mutant.line) == 1, f"{mutant.file} holds {text.count(mutant.line)} times: {mutant.line}"
    changed = folder / "cuda"  # beside a "..", as csrc/cuda is
    changed.mkdir()
    (changed / mutant.file).write_text(text.replace(mutant.line, mutant.wrong))
    units = [mutant.file] if mutant.file.endswith(".cu") else [p.name for p in SOURCES.glob("*.cu") if includes(p, mutant.file)]
    for unit in units:
        if unit != mutant.file:
            (changed / unit).write_text((SOURCES / unit).read_text())
    commands = ninja_commands()
    *_, link = (c for c in commands if " -shared " in c)
    for unit in units:
        name = f"{Path(unit).stem}.simt.o"
        (compile_it,) = (c for c in commands if f" -o {name}" in c)
        source = str(SOURCES / unit)
        assert source in compile_it
        run(
            compile_it.replace(source, f"-I{SOURCES} {changed / unit}")
            .replace(f" -o {name}", f" -o {folder / name}")
            .replace(f"{name}.d", str(folder / "d"))
        )
        link = link.replace(f" {name} ", f" {folder / name} ")
    library = folder / "_cuda.so"
    run(re.sub(r" -o \S+", f" -o {library}", link))
    # pybind11 keeps modules by name: under its own it would be the one that is loaded.
    spec = importlib.util.spec_from_file_location(f"{folder.name}._cuda", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def objects() -> Path:
    return next(p.parent for p in (ROOT / "build").glob("temp.*/simt.ninja"))


def ninja_commands() -> list[str]:
    command = [f"{ninja.BIN_DIR}/ninja", "-f", "simt.ninja", "-t", "commands"]
    return subprocess.run(command, cwd=objects(), capture_output=True, text=True, check=True).stdout.splitlines()


def includes(source: Path, header: str) -> bool:
    """Directly or through another header."""
    seen, todo = set(), [source]
    while todo:
        for name in re.findall(r'#include "([\w.]+)"', todo.pop().read_text()):
            path = SOURCES / name
            if path.exists() and name not in seen:
                seen.add(name)
                todo.append(path)
    return header in seen


def run(command: str) -> None:
    done = subprocess.run(shlex.split(command), cwd=objects(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
