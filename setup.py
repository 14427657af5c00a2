"""Builds fastllm's compiled modules with ninja, without PyTorch.

Every source of csrc/cpu whose header has a FASTLLM_KERNEL line is compiled once for each rung of the instruction-set
ladder up to the one that the line names, each time with that rung's flags. The bindings are compiled as one translation
unit: pybind11's headers cost seconds, each op's doors a fraction of one. Everything else is compiled once, at the baseline.

Variables: CXX names the compiler; FASTLLM_CXXFLAGS adds flags, e.g. a sanitizer's; FASTLLM_EMULATE=1 builds the AVX-512
rungs from SIMDe's emulation, for tests (tests/native/variant.py).
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CPU = ROOT / "csrc" / "cpu"
EMULATED = os.environ.get("FASTLLM_EMULATE") == "1"

X86 = platform.machine().lower() in ("x86_64", "amd64")
_AVX2 = "-mavx2 -mfma -mf16c"
_AVX512 = f"{_AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl"
# The ladder, lowest first. The order is that of `enum class Isa` in csrc/cpu/isa.h.
RUNGS = {
    "scalar": "-fno-tree-vectorize",  # the twin that the others are compared with stays honest
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_vnni": f"{_AVX512} -mavx512vnni",
    "avx512_bf16": f"{_AVX512} -mavx512vnni -mavx512bf16",
}
# No fast-math: results mean what the source says. -fno-math-errno only lets sqrt be an instruction.
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -ffp-contract=off -fno-lto -Wall -Wextra"


def rungs_of(source: Path) -> list[str]:
    """The rungs that an op's source is compiled for; none for baseline sources."""
    header = source.with_suffix(".h")
    found = re.findall(r"^FASTLLM_KERNEL\(\w+, \w+, (\w+)\)", header.read_text(), re.M) if header.exists() else []
    if not found:
        return []
    names = list(RUNGS)
    return names[: max(map(names.index, found)) + 1] if X86 else ["scalar"]


def is_emulated(rung: str) -> bool:
    return EMULATED and rung.startswith("avx512")


def rung_flags(rung: str, compiler: str) -> str:
    flags = RUNGS[rung] if X86 else ""
    if is_emulated(rung):
        flags = f"{_AVX2} -O1 -Wno-psabi -isystem {ROOT / 'tests' / 'native' / 'simde_avx512'}"
    elif rung.startswith("avx512") and "clang" not in compiler:
        # GCC 12 warns of uninitialised registers inside its own avx512fintrin.h (GCC bug 105593).
        flags += " -Wno-uninitialized -Wno-maybe-uninitialized"
    return f"{flags} -DFASTLLM_ISA={rung} -DFASTLLM_ISA_LEVEL={list(RUNGS).index(rung)}"


def checked_compiler() -> tuple[str, str]:
    """The compiler's command, and the first line of what it says of itself. One sentence if it can't do the work."""
    command = os.environ.get("CXX", "c++")
    if shutil.which((shlex.split(command) or [""])[0]) is None:
        raise SystemExit(
            f"fastllm: the C++ compiler is '{command}', which is not on PATH; the build needs GCC 10, Clang 12 or newer: "
            "install it (Debian: apt-get install g++), or name one in the variable CXX"
        )

    def run(arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(shlex.split(f"{command} {arguments}"), capture_output=True, text=True, check=False)

    version = run("--version").stdout.partition("\n")[0]
    trial = run(f"{FLAGS} {RUNGS['avx512_bf16'] if X86 else ''} -fsyntax-only -x c++ {os.devnull}")
    if trial.returncode:
        complaint = (trial.stderr.strip() or f"exit status {trial.returncode}").splitlines()[0]
        raise SystemExit(f"fastllm: the build needs GCC 10, Clang 12 or newer, got {command} ({version}): {complaint}")
    return command, version


def ninja_program() -> str:
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise SystemExit("fastllm: the build needs ninja, expected on PATH or from `pip install ninja`") from None
        return found
    return os.path.join(ninja.BIN_DIR, "ninja")


def escaped(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def cpu_objects(build: Path, compiler: str) -> list[tuple[Path, str, str]]:
    """(source, object name, extra flags) of everything that makes up fastllm._cpu."""
    import pybind11

    doors = [CPU / "bindings.cpp", *sorted(CPU.glob("bind_*.cpp"))]
    together = build / "all_bindings.cpp"
    text = "".join(f'#include "{door}"\n' for door in doors)
    if not together.exists() or together.read_text() != text:  # its time stamp is what ninja looks at
        together.write_text(text)
    headers = f"-I{sysconfig.get_paths()['include']} -isystem {pybind11.get_include()}"
    # First, because it takes longest; -O1, because nothing in it loops.
    objects = [(together, "all_bindings.o", f"-O1 {headers}")]
    for source in sorted(set(CPU.glob("*.cpp")) - set(doors)):
        rungs = rungs_of(source)
        for rung in rungs:
            # Emulated objects go by a name of their own: everything else is shared with the real build.
            name = f"{source.stem}.{rung}{'.emulated' if is_emulated(rung) else ''}.o"
            objects.append((source, name, rung_flags(rung, compiler)))
        if EMULATED and source.stem == "cpu_features":
            objects.append((source, "cpu_features.emulated.o", "-DFASTLLM_EMULATED"))
        elif not rungs:
            objects.append((source, f"{source.stem}.o", ""))
    return objects


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        command, compiler = checked_compiler()
        print("fastllm: building the CPU kernels; CUDA C++ kernels are not part of this version", flush=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        # An editable install is given a directory that vanishes, which would lose the objects.
        temporary = None if self.editable_mode else self.build_temp
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build = Path(temporary or ROOT / "build" / f"temp.{tag}").resolve()
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        extra = os.environ.get("FASTLLM_CXXFLAGS", "")
        link = "-shared -pthread" if sys.platform != "darwin" else "-bundle -undefined dynamic_lookup"
        lines = [
            f"cxx = {command}",
            f"flags = {FLAGS} -I{ROOT / 'csrc'} {extra}",
            "rule cxx",
            "  command = $cxx $flags $more -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = c++ $out",
            "rule link",
            f"  command = $cxx {extra} {link} $in -o $out {'-ldl' if sys.platform == 'linux' else ''}",
            "  description = link $out",
        ]
        names = []
        for source, name, more in cpu_objects(build, compiler):
            lines += [f"build {name}: cxx {escaped(source)}", f"  more = {more}"]
            names.append(name)
        lines += [f"build {escaped(output)}: link {' '.join(names)}", f"default {escaped(output)}", ""]
        plan = build / ("emulated.ninja" if EMULATED else "build.ninja")
        plan.write_text("\n".join(lines))
        program = [ninja_program(), "-C", str(build), "-f", plan.name, *(["-j", str(self.parallel)] if self.parallel else [])]
        if subprocess.run(program, check=False).returncode:
            raise SystemExit("fastllm: the C++ build failed; the compiler's messages stand above")


setup(ext_modules=[Extension("fastllm._cpu", sources=[])], cmdclass={"build_ext": NinjaBuild})
