"""Builds fastllm's compiled modules with ninja, without PyTorch.

fastllm._cpu: every source of csrc/cpu whose header has a FASTLLM_KERNEL line is compiled once for each rung of the instruction-set
ladder up to the one that the line names, each time with that rung's flags. The bindings are compiled as one translation
unit: pybind11's headers cost seconds, each op's doors a fraction of one. Everything else is compiled once, at the baseline.

fastllm._cuda, where nvcc is found: csrc/cuda/*.cu for the GPU of this machine, or for all that wheels are made for where there
is none; the CUDA runtime is linked in, and nothing else of CUDA's is needed to import it.

Variables: CXX names the compiler; FASTLLM_CXXFLAGS adds flags, e.g. a sanitizer's; FASTLLM_CUDA=0 leaves the CUDA kernels out,
FASTLLM_CUDA="80 90a 120+PTX" names the architectures, CUDA_HOME the toolkit. For tests (tests/native/variant.py):
FASTLLM_EMULATE=1 builds the AVX-512 rungs from SIMDe's emulation, FASTLLM_CUDA=simt the CUDA kernels for tests/simt's executor.
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
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CPU, CUDA, SIMT = ROOT / "csrc" / "cpu", ROOT / "csrc" / "cuda", ROOT / "tests" / "simt"
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


# ---------------------------------------------------------------- CUDA

# Those of wheels: data centres' and desktops' of the last three generations; PTX for what comes.
WHEEL_ARCHITECTURES = "80 86 89 90a 100a 120+PTX"
# No fast-math here either: nvcc's defaults, said aloud. A spilled register is a warning; `make compile-cuda` makes it an error.
NVCC_FLAGS = (
    "-std=c++17 -O3 -ftz=false -prec-div=true -prec-sqrt=true --expt-relaxed-constexpr -Xptxas -warn-spills "
    "-Xcompiler -fPIC,-fvisibility=hidden"
)


class Toolkit(NamedTuple):
    nvcc: str
    root: Path
    architectures: list[str]


def find_nvcc() -> str | None:
    """CUDA_HOME's, the one on PATH, the one where CUDA's installer puts it, or the one of the package nvidia-cuda-nvcc."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    for home in filter(None, homes):
        if (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    if found := shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin"):
        return found
    return next(map(str, Path(sysconfig.get_paths()["purelib"]).glob("nvidia/cu*/bin/nvcc")), None)


def gpu_architectures() -> list[str]:
    """Of the GPUs in this machine, as its driver's tool tells them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    asked = subprocess.run(
        [tool, "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    numbers = {line.strip().replace(".", "") for line in asked.stdout.splitlines() if re.fullmatch(r"\d+\.\d+\s*", line)}
    return [n + ("a" if n in ("90", "100") else "") for n in sorted(numbers, key=int)]


def cuda_toolkit() -> Toolkit | None:
    """What compiles the CUDA kernels, and for which GPUs; None where they are left out: unwanted, or no nvcc."""
    wanted = os.environ.get("FASTLLM_CUDA") or "auto"
    if wanted in ("0", "simt"):
        return None
    nvcc = find_nvcc()
    if nvcc is None:
        if wanted != "auto":
            raise SystemExit(
                f"fastllm: FASTLLM_CUDA is '{wanted}' and no nvcc was found; put it on PATH or name it in CUDA_HOME"
            )
        return None
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False).stderr
    root = re.search(r"^#\$ TOP=(.*)$", plan, re.M)
    if root is None:
        raise SystemExit(f"fastllm: {nvcc} --dryrun does not say where its toolkit is: {plan[:200]}")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False).stdout.split()
    present = gpu_architectures() if wanted == "auto" else wanted.split()
    names = present or WHEEL_ARCHITECTURES.split()
    # The list has no names of one generation alone: sm_90 stands for 90a.
    chosen = [name for name in names if f"sm_{name.removesuffix('+PTX').removesuffix('a')}" in known]
    if not chosen or (present and chosen != present):
        raise SystemExit(f"fastllm: the CUDA kernels are to be built for {' '.join(names)}; {nvcc} knows {' '.join(known)}")
    if not chosen[-1].endswith("+PTX") and not present:
        chosen[-1] += "+PTX"  # an older nvcc: the newest that it knows
    return Toolkit(nvcc, Path(root[1]).resolve(), chosen)


def architecture_flags(names: list[str]) -> str:
    flags = []
    for name in names:
        number = name.removesuffix("+PTX")
        flags.append(f"-gencode arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode arch=compute_{number},code=compute_{number}")
    return " ".join(flags)


# ---------------------------------------------------------------- what is compiled: (source, object, rule, more flags)

Objects = list[tuple[Path, str, str, str]]


def all_bindings(build: Path, folder: Path) -> Path:
    """One source that includes every door in a folder."""
    doors = [folder / "bindings.cpp", *sorted(folder.glob("bind_*.cpp"))]
    together = build / f"all_{folder.name}_bindings.cpp"
    text = "".join(f'#include "{door}"\n' for door in doors)
    if not together.exists() or together.read_text() != text:  # its time stamp is what ninja looks at
        together.write_text(text)
    return together


def is_door(source: Path) -> bool:
    return source.name == "bindings.cpp" or source.name.startswith("bind_")


def binding_flags() -> str:
    import pybind11

    # -O1, because nothing in it loops.
    return f"-O1 -I{sysconfig.get_paths()['include']} -isystem {pybind11.get_include()}"


def cpu_objects(build: Path, compiler: str) -> Objects:
    """Everything that makes up fastllm._cpu."""
    # The doors first, because they take longest.
    objects = [(all_bindings(build, CPU), "all_cpu_bindings.o", "cxx", binding_flags())]
    for source in sorted(s for s in CPU.glob("*.cpp") if not is_door(s)):
        rungs = rungs_of(source)
        for rung in rungs:
            # Emulated objects go by a name of their own: everything else is shared with the real build.
            name = f"{source.stem}.{rung}{'.emulated' if is_emulated(rung) else ''}.o"
            objects.append((source, name, "cxx", rung_flags(rung, compiler)))
        if EMULATED and source.stem == "cpu_features":
            objects.append((source, "cpu_features.emulated.o", "cxx", "-DFASTLLM_EMULATED"))
        elif not rungs:
            objects.append((source, f"{source.stem}.o", "cxx", ""))
    return objects


def simt_objects(build: Path) -> Objects:
    """fastllm._cuda for the executor: the same sources, compiled by the host's compiler."""
    flags = f"-DFASTLLM_SIMT -I{SIMT} -O1 -Wno-unknown-pragmas -DFASTLLM_CUDA_ARCHS='\"\"'"
    objects = [(all_bindings(build, CUDA), "all_cuda_bindings.simt.o", "cxx", f"{flags} {binding_flags()}")]
    for source in (*sorted(CUDA.glob("*.cu")), *sorted(CUDA.glob("*.cpp")), *sorted(SIMT.glob("*.cpp"))):
        if not is_door(source):
            objects.append((source, f"{source.stem}.simt.o", "cxx", f"-x c++ {flags}" if source.suffix == ".cu" else flags))
    return objects


def cuda_objects(build: Path, toolkit: Toolkit) -> Objects:
    """fastllm._cuda: kernels by nvcc, the rest by the host's compiler."""
    flags = f"-isystem {toolkit.root / 'include'} -DFASTLLM_CUDA_ARCHS='\"{' '.join(toolkit.architectures)}\"'"
    objects = [(source, f"{source.stem}.cu.o", "nvcc", "") for source in sorted(CUDA.glob("*.cu"))]
    objects.append((all_bindings(build, CUDA), "all_cuda_bindings.o", "cxx", f"{flags} {binding_flags()}"))
    for source in sorted(s for s in CUDA.glob("*.cpp") if not is_door(s)):
        objects.append((source, f"{source.stem}.cuda.o", "cxx", flags))
    return objects


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        command, compiler = checked_compiler()
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        # An editable install is given a directory that vanishes, which would lose the objects.
        temporary = None if self.editable_mode else self.build_temp
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build = Path(temporary or ROOT / "build" / f"temp.{tag}").resolve()
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        extra = os.environ.get("FASTLLM_CXXFLAGS", "")
        link = "-shared -pthread" if sys.platform != "darwin" else "-bundle -undefined dynamic_lookup"
        libraries = "-ldl" if sys.platform == "linux" else ""
        lines = [
            f"cxx = {command}",
            f"flags = {FLAGS} -I{ROOT / 'csrc'} {extra}",
            "rule cxx",
            "  command = $cxx $flags $more -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = c++ $out",
        ]
        if ext.name == "fastllm._cpu":
            print("fastllm: building the CPU kernels", flush=True)
            objects, plan = cpu_objects(build, compiler), "emulated.ninja" if EMULATED else "cpu.ninja"
        elif FOR_EXECUTOR:
            print("fastllm: building the CUDA kernels for the executor in tests/simt", flush=True)
            objects, plan = simt_objects(build), "simt.ninja"
        else:
            assert TOOLKIT is not None  # or there would be no such extension
            print(f"fastllm: building the CUDA kernels with {TOOLKIT.nvcc} for {' '.join(TOOLKIT.architectures)}", flush=True)
            objects, plan = cuda_objects(build, TOOLKIT), "cuda.ninja"
            libraries = f"-L{TOOLKIT.root / 'lib64'} -L{TOOLKIT.root / 'lib'} -lcudart_static -ldl -lrt"
            lines += [
                f"nvcc = {TOOLKIT.nvcc} -ccbin {shlex.split(command)[0]} {NVCC_FLAGS} -I{ROOT / 'csrc'}",
                "rule nvcc",
                f"  command = $nvcc {architecture_flags(TOOLKIT.architectures)} $more -MMD -MF $out.d -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
                "  description = nvcc $out",
            ]
        lines += [
            "rule link",
            f"  command = $cxx {extra} {link} $in -o $out {libraries}",
            "  description = link $out",
        ]
        for source, name, rule, more in objects:
            lines += [f"build {name}: {rule} {escaped(source)}", f"  more = {more}"]
        names = [name for _, name, _, _ in objects]
        lines += [f"build {escaped(output)}: link {' '.join(names)}", f"default {escaped(output)}", ""]
        (build / plan).write_text("\n".join(lines))
        program = [ninja_program(), "-C", str(build), "-f", plan, *(["-j", str(self.parallel)] if self.parallel else [])]
        if subprocess.run(program, check=False).returncode:
            raise SystemExit("fastllm: the C++ build failed; the compiler's messages stand above")


FOR_EXECUTOR = os.environ.get("FASTLLM_CUDA") == "simt"
TOOLKIT = cuda_toolkit()
MODULES = ["fastllm._cpu", *(["fastllm._cuda"] if FOR_EXECUTOR or TOOLKIT is not None else [])]
if __name__ == "__main__":  # tests/native/cuda_table.py reads the flags above
    setup(ext_modules=[Extension(name, sources=[]) for name in MODULES], cmdclass={"build_ext": NinjaBuild})
