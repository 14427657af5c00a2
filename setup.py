"""Builds fastllm's compiled modules with ninja, without PyTorch.

Every source of csrc/cpu whose header has a FASTLLM_KERNEL line is compiled once for each rung of the instruction-set
ladder up to the one that the line names, each time with that rung's flags; all other sources once, at the baseline.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CPU = ROOT / "csrc" / "cpu"

X86 = platform.machine().lower() in ("x86_64", "amd64")
_AVX2 = "-mavx2 -mfma -mf16c"
# GCC 12 warns of uninitialised registers inside its own avx512fintrin.h (GCC bug 105593).
_AVX512 = f"{_AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -Wno-uninitialized -Wno-maybe-uninitialized"
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
    found = re.search(r"^FASTLLM_KERNEL\(\w+, \w+, (\w+)\)", header.read_text(), re.M) if header.exists() else None
    if found is None:
        return []
    names = list(RUNGS)
    return names[: names.index(found[1]) + 1] if X86 else ["scalar"]


def cpu_objects() -> list[tuple[Path, str, str]]:
    """(source, object name, extra flags) of everything that makes up fastllm._cpu."""
    objects = []
    for source in sorted(CPU.glob("*.cpp")):
        for rung in rungs_of(source):
            level = list(RUNGS).index(rung)
            flags = f"{RUNGS[rung]} -DFASTLLM_ISA={rung} -DFASTLLM_ISA_LEVEL={level}"
            objects.append((source, f"{source.stem}.{rung}.o", flags))
        if not rungs_of(source):
            objects.append((source, f"{source.stem}.o", ""))
    return objects


def ninja_program() -> str:
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise SystemExit("fastllm: the build needs ninja, expected on PATH or from `pip install ninja`") from None
        return found
    return os.path.join(ninja.BIN_DIR, "ninja")


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CXX", "c++")
        extra = os.environ.get("FASTLLM_CXXFLAGS", "")  # e.g. the sanitizers' flags
        includes = f"-I{sysconfig.get_paths()['include']} -I{pybind11.get_include()} -I{ROOT / 'csrc'}"
        link = "-shared -pthread" if sys.platform != "darwin" else "-bundle -undefined dynamic_lookup"
        lines = [
            f"cxx = {compiler}",
            f"flags = {FLAGS} {includes} {extra}",
            "rule cxx",
            "  command = $cxx $flags $rung -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = c++ $out",
            "rule link",
            f"  command = $cxx {extra} {link} $in -o $out -ldl",
            "  description = link $out",
        ]
        names = []
        for source, name, rung_flags in cpu_objects():
            lines += [f"build {name}: cxx {str(source).replace(' ', '$ ')}", f"  rung = {rung_flags}"]
            names.append(name)
        lines += [f"build {output}: link {' '.join(names)}", f"default {output}", ""]
        (build / "build.ninja").write_text("\n".join(lines))
        subprocess.run([ninja_program(), "-C", str(build)], check=True)


setup(ext_modules=[Extension("fastllm._cpu", sources=[])], cmdclass={"build_ext": NinjaBuild})
