"""The build: no rung's instructions leak into another, the ladder is one everywhere, and what is missing is said in words."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from native import rungs

import fastllm
from fastllm import backends
from fastllm.backends import cpu_module, cuda_executor, cuda_module

ROOT = Path(__file__).resolve().parents[1]
BUILD = next(iter(ROOT.glob(f"build/temp.*{sys.implementation.cache_tag}")), None)
needs_disassembler = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("objdump") is None, reason="needs x86-64 and objdump"
)


@pytest.fixture(scope="module")
def survey():
    return rungs.survey(rungs.instructions(Path(cpu_module().__file__)))


@needs_disassembler
def test_no_function_uses_an_instruction_above_its_rung(survey):
    assert not survey[1]


@needs_disassembler
def test_the_survey_sees_every_rung(survey):
    uses = survey[0]
    assert all(use.functions for use in uses.values())
    assert uses["baseline"].vex == uses["baseline"].evex == uses["scalar"].vex == 0
    assert uses["avx2"].widest == "ymm" and uses["avx2"].vex > 1000 and uses["avx2"].evex == 0
    assert uses["avx512"].widest == "zmm" and uses["avx512"].evex > 1000


@needs_disassembler
@pytest.mark.skipif(BUILD is None, reason="no object files here: python setup.py build_ext --inplace")
def test_a_rungs_objects_offer_the_linker_nothing_but_their_entries():
    objects = rungs.rung_objects(BUILD)
    assert {p.name.split(".")[1] for p in objects} == set(rungs.RUNGS) - {"baseline"}
    assert not rungs.leaks(objects)


LEAK = """
template <typename T>
T largest(const T* p, int n) {  // external linkage: the linker keeps one copy for every rung
  T best = p[0];
  for (int i = 1; i < n; ++i) best = p[i] > best ? p[i] : best;
  return best;
}
namespace fastllm::cpu::%s {
float kernel(const float* p, int n) { return largest(p, n); }
}
"""


@needs_disassembler
def test_the_survey_finds_a_template_that_two_rungs_share(tmp_path):
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip("needs a C++ compiler")
    objects = []
    for rung, flags in (("avx512", ["-mavx512f", "-mprefer-vector-width=512"]), ("scalar", [])):
        source = tmp_path / f"leak_{rung}.cpp"
        source.write_text(LEAK % rung)
        objects.append(tmp_path / f"leak.{rung}.o")
        # -fno-inline stands for a function too large to be inlined.
        options = ["-std=c++17", "-O3", "-ffast-math", "-fPIC", "-fno-inline"]
        subprocess.run([*compiler, *options, *flags, "-c", source, "-o", objects[-1]], check=True)
    found = rungs.leaks(objects)
    assert len(found) == 2 and all("largest" in sentence for sentence in found)
    library = tmp_path / "leak.so"
    subprocess.run([*compiler, "-shared", *objects, "-o", library], check=True)
    wrong = rungs.survey(rungs.instructions(library))[1]
    assert len(wrong) == 1
    assert re.search(r"largest.* is of rung baseline and uses an instruction of avx512", wrong[0])


@pytest.mark.parametrize(
    ("symbol", "rung"),
    [
        ("_ZN7fastllm3cpu6avx5128rms_normERKNS0_11RmsNormArgsE", "avx512"),
        ("_ZN7fastllm3cpu11avx512_vnni12_GLOBAL__N_13dotEv.cold", "avx512_vnni"),
        ("_ZL12parallel_forIZN7fastllm3cpu4avx28rms_normERKNS1_11RmsNormArgsEEUlllE_EvlliOT_", "avx2"),
        ("_ZN7fastllm3cpu10run_chunksElliPFvPvllES1_", "baseline"),
        ("PyInit__cpu", "baseline"),
    ],
)
def test_symbols_are_told_apart(symbol, rung):
    assert rungs.rung_of_symbol(symbol) == rung


@pytest.mark.parametrize(
    ("encoding", "text", "rung"),
    [
        ("62 f1 7c 48 58 c1", "vaddps %zmm1,%zmm0,%zmm0", "avx512"),
        ("62 f1 7c 08 58 c1", "vaddps %xmm1,%xmm0,%xmm0", "avx512"),  # a 128-bit register, encoded for AVX-512VL
        ("c5 f8 92 c8", "kmovw %eax,%k1", "avx512"),  # VEX, but a mask register
        ("c5 fc 58 c1", "vaddps %ymm1,%ymm0,%ymm0", "avx2"),
        ("62 f2 7d 48 50 c1", "vpdpbusd %zmm1,%zmm0,%zmm0", "avx512_vnni"),
        ("62 f2 7e 48 52 c1", "vdpbf16ps %zmm1,%zmm0,%zmm0", "avx512_bf16"),
        ("0f 58 c1", "addps %xmm1,%xmm0", "baseline"),
        ("66 0f 62 c1", "punpckldq %xmm1,%xmm0", "baseline"),
    ],
)
def test_instructions_are_told_apart(encoding, text, rung):
    assert rungs.rung_of_instruction(encoding.split(), text) == rung


def test_the_ladder_is_the_same_in_the_build_and_in_the_kernels():
    names = re.search(r"enum class Isa : int \{ (.*) \};", (ROOT / "csrc/cpu/isa.h").read_text())[1].split(", ")
    in_setup = re.search(r"^RUNGS = \{\n(.*?)^\}", (ROOT / "setup.py").read_text(), re.M | re.S)[1]
    assert re.findall(r'^    "(\w+)":', in_setup, re.M) == names == list(rungs.RUNGS[1:])


def build(tmp_path, **environment):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", tmp_path / "t", "--build-lib", tmp_path / "l"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("compiler", "sentence"),
    [
        ("no-such-compiler", r"fastllm: the C\+\+ compiler is 'no-such-compiler', which is not on PATH; "),
        ("false", r"fastllm: the build needs GCC 10, Clang 12 or newer, got false \(.*\): "),
    ],
)
def test_a_missing_or_unfit_compiler_is_one_sentence(tmp_path, compiler, sentence):
    done = build(tmp_path, CXX=compiler)
    assert done.returncode != 0
    assert re.match(sentence, done.stderr.strip().splitlines()[-1]), done.stderr
    assert "Traceback" not in done.stderr


def test_the_source_distribution_can_be_built_from(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    needed = [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "fastllm").rglob("*.py"), ROOT / "setup.py", ROOT / "LICENSE"]
    missing = [str(p.relative_to(ROOT)) for p in needed if str(p.relative_to(ROOT)) not in inside]
    assert not missing
    assert not [name for name in inside if name.endswith((".so", ".o", ".pyc"))]


def test_an_architecture_that_nvcc_does_not_know_is_one_sentence(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    done = build(tmp_path, FASTLLM_CUDA="80 7")
    assert done.returncode != 0
    assert done.stderr.startswith("fastllm: the CUDA kernels are to be built for 80 7; "), done.stderr


@pytest.mark.skipif(cuda_module() is None or cuda_executor(), reason="`make compile-cuda` builds it and runs this")
def test_cuda_module_is_imported_without_a_gpu_and_says_so():
    facts = fastllm.info()["cuda_kernels"]
    assert facts["architectures"] and facts["runtime"] >= 12000
    libraries = subprocess.run(["ldd", cuda_module().__file__], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"libcuda|libcudart|libtorch|libc10", libraries), libraries
    if torch.cuda.is_available():
        return
    assert facts["devices"] == 0
    assert facts["why"] == "no CUDA driver is installed" or facts["why"].startswith("the CUDA driver says: ")
    assert backends.cuda_refusal(8, 6) is None
    assert backends.cuda_refusal(9, 0) == "it was compiled for 80, not for compute capability 9.0"
    x = torch.ones(2, 64)
    with pytest.raises(NotImplementedError, match="it takes CUDA tensors, not cpu"), fastllm.use_backend("cuda"):
        fastllm.rms_norm(x, None)
    with pytest.raises(ValueError, match="a tensor is on the CPU, expected a CUDA device"):
        cuda_module().rms_norm(x, None, None, torch.empty_like(x), None, 1e-6, 0.0, True)
