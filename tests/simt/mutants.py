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
    Mutant("gated_activation.cu", "the second vector is the first", "first + v * kThreads * kVec;\n    if (has_work(i)) {", "first;\n    if (has_work(i)) {", "gated_activation"),
    Mutant("rms_norm.cu", "int8: lanes past K do not take part", "kInt8 ? k - threadIdx.x % 32 * kVec : k", "k", "rms_norm_int8 and 200"),
    Mutant("rms_norm.cu", "int8: of what was not rounded to the dtype", "row, k, K, widened(rounded)", "row, k, K, y", "rms_norm_int8 and 33x576 and bfloat16"),
    Mutant("rms_norm.cu", "int8: lanes past K bring the first column's weight", "load_pack<T, kVec>(weight + k, k < K)", "load_pack<T, kVec>(weight + (k < K ? k : 0))", "rms_norm_int8 and infinities"),
    Mutant("gated_activation.cu", "int8: lanes past I do not take part", "kInt8 ? i - threadIdx.x % 32 * kVec : i", "i", "gated_activation_int8 and 200"),
    Mutant("gated_activation.cu", "int8: of what was not rounded to the dtype", "row, i, a.I, widened(rounded)", "row, i, a.I, h", "gated_activation_int8 and 320 and bfloat16"),
    Mutant("reduce.cuh", "a group of integers is of half its lanes", "distance < lanes)", "distance < lanes / 2)", "rms_norm_int8 and g64"),
    Mutant("int8_groups.cuh", "a group's scale and sum go to its neighbour", "row * to.num_groups + group]", "row * to.num_groups + (group + 1) % to.num_groups]", "rms_norm_int8 and g32"),
    Mutant("int8_groups.cuh", "the sum is of values, cut off", "sum = __dp4a(static_cast<int>(four), 0x01010101, sum);", "for (int j = 0; j < 4; ++j) sum += static_cast<int>(y.at[i + j] * scale.inverse);", "rms_norm_int8 and g32"),
    Mutant("int8_groups.cuh", "two integers change places", "__byte_perm(bits[0], bits[1], 0x0040)", "__byte_perm(bits[1], bits[0], 0x0040)", "gated_activation_int8 and 320"),
    Mutant("int8_groups.cuh", "an infinity times 0 is an integer", "scale.inverse != 0.0f ? __byte_perm(low, high, 0x5410) : 0", "__byte_perm(low, high, 0x5410)", "gated_activation_int8 and infinities"),
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
    # A header is looked for beside who includes it: all that lies between it and the units has to be there too.
    users = [p for p in (*SOURCES.glob("*.cu"), *SOURCES.glob("*.cuh")) if p.name == mutant.file or includes(p, mutant.file)]
    units = [p.name for p in users if p.suffix == ".cu"]
    for user in users:
        if user.name != mutant.file:
            (changed / user.name).write_text(user.read_text())
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
