"""How tensors cross into C++: both ways see the same, odd tensors are refused in words, nothing leaks, no torch is linked."""

from __future__ import annotations

import gc
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastllm
from fastllm.backends import cpu_module

_cpu = cpu_module()
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.bool,
)
HAS_EXCHANGE_API = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")


@pytest.fixture(params=["exchange api", "attributes"])
def boundary(request):
    """Both ways in, whatever the process uses."""
    wanted = request.param == "exchange api"
    if wanted and not HAS_EXCHANGE_API:
        pytest.skip(f"PyTorch {torch.__version__} has no DLPack exchange API")
    assert _cpu.use_exchange_api(wanted) is wanted
    yield request.param
    _cpu.use_exchange_api(True)


def expected_view(t):
    dtype = str(t.dtype).removeprefix("torch.")
    return (t.data_ptr(), dtype, t.is_cpu, max(t.get_device(), 0), tuple(t.shape), t.stride())


class Subclass(torch.Tensor):
    pass


def shapes_and_strides():
    base = torch.arange(2 * 3 * 4 * 5)
    yield "contiguous", base.view(2, 3, 4, 5)
    yield "transposed", base.view(6, 20).T
    yield "offset", base[7:]
    yield "strided", base[3::7]
    yield "permuted", base.view(2, 3, 4, 5).permute(3, 1, 0, 2)[1:, :, :, ::2]
    yield "expanded", base[:4].view(4, 1).expand(4, 9)
    yield "no dims", base[5]
    yield "no elements", base[:0]
    yield "no rows", torch.empty(0, 64)
    yield "no columns", torch.empty(3, 0, 2)
    yield "eight dims", base.view(1, 2, 1, 3, 1, 4, 1, 5)
    yield "unfolded", base.unfold(0, 8, 3)


@pytest.mark.parametrize(("name", "t"), list(shapes_and_strides()), ids=lambda v: v if isinstance(v, str) else "")
def test_view_has_the_tensors_address_shape_and_strides(boundary, name, t):
    for dtype in (torch.float32, torch.int8):
        x = t.to(dtype) if name in ("no dims", "offset") else t
        assert _cpu.tensor_view(x) == expected_view(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_view_has_the_tensors_dtype(boundary, dtype):
    t = torch.zeros(3, 5).to(dtype)
    assert _cpu.tensor_view(t) == expected_view(t)


def test_parameters_gradients_and_subclasses_are_tensors(boundary):
    x = torch.randn(2, 3)
    for t in (
        torch.nn.Parameter(x.clone()),
        x.clone().requires_grad_(),
        (x.clone().requires_grad_() * 2),
        x.clone().as_subclass(Subclass),
    ):
        assert _cpu.tensor_view(t) == expected_view(t)
    with torch.inference_mode():
        t = torch.randn(2, 3)
    assert _cpu.tensor_view(t) == expected_view(t)


@pytest.mark.parametrize("value", [None, 1.5, [1.0], "x", torch.float32, torch.Tensor], ids=repr)
def test_what_is_no_tensor_is_a_type_error(boundary, value):
    with pytest.raises(TypeError, match=rf"an argument is a [a-zA-Z_.]*{type(value).__name__}, expected a torch\.Tensor"):
        _cpu.tensor_view(value)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int16, torch.float8_e4m3fn], ids=str)
def test_other_dtypes_are_refused_by_name(boundary, dtype):
    with pytest.raises(TypeError, match=rf"{dtype} strided tensor on cpu, expected dtype float32, .* or bool"):
        _cpu.tensor_view(torch.zeros(3).to(dtype))


def test_more_than_eight_dims_are_refused(boundary):
    with pytest.raises(ValueError, match="9 dims, expected at most 8"):
        _cpu.tensor_view(torch.zeros([1] * 9))


def memoryless():
    x = torch.randn(4, 4)
    yield "meta", lambda: torch.empty(4, 4, device="meta")
    yield "sparse", lambda: x.relu().to_sparse()
    yield "sparse_csr", lambda: x.relu().to_sparse_csr()
    yield "mkldnn", x.to_mkldnn

    def fake():
        with FakeTensorMode():
            return torch.empty(4, 4)

    yield "fake", fake
    yield "nested", lambda: torch.nested.nested_tensor([x, x[:2]])
    yield "functional", lambda: torch._to_functional_tensor(x)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "make"), list(memoryless()), ids=lambda v: v if isinstance(v, str) else "")
def test_tensors_without_memory_of_their_own_are_refused(boundary, name, make):
    with pytest.raises(TypeError, match=r"expected a dense tensor with memory of its own, because|expected dtype") as raised:
        _cpu.tensor_view(make())
    assert "\n" not in str(raised.value)  # no C++ stack


def test_tensors_inside_functorch_are_refused(boundary):
    seen = []

    def body(x):
        with pytest.raises(TypeError, match="expected a dense tensor"):
            _cpu.tensor_view(x)
        seen.append(1)
        return x

    torch.func.vmap(body)(torch.randn(3, 4))
    assert seen


def test_a_lazily_negated_tensor_gets_the_right_answer():
    x, weight = torch.randn(3, 8), torch.ones(8)
    y = fastllm.rms_norm(torch._neg_view(x), weight)
    assert y.equal(fastllm.rms_norm(-x, weight))


def test_no_reference_and_no_memory_is_kept(boundary):
    # The caster fills a view; it must leave the tensor, its type and the heap as they were.
    t = torch.randn(3, 5)
    bad = torch.zeros(3, dtype=torch.int16)

    def calls(n):
        for _ in range(n):
            _cpu.tensor_view(t)
        for _ in range(n // 20):
            with pytest.raises(TypeError):
                _cpu.tensor_view(bad)

    def counts(*objects):
        return [sys.getrefcount(o) for o in objects]

    own, shared = (t, bad), (t.dtype, bad.dtype, torch.Tensor)

    calls(2000)  # caches fill
    gc.collect()
    before, before_shared = counts(*own), counts(*shared)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    n = 100_000 if boundary == "exchange api" else 20_000
    calls(n)
    gc.collect()
    assert counts(*own) == before
    # The whole process refers to these, and what other tests left may go meanwhile. A reference kept or dropped too
    # often is n, or n / 20 for a refused tensor's, away.
    for name, was, count in zip(("fp32", "int16", "Tensor"), before_shared, counts(*shared), strict=True):
        assert abs(count - was) < n / 40, f"{name}: {was} references before, {count} after"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown < 8 * 1024, f"{grown} KiB more after 10^5 calls"  # ru_maxrss is in KiB; one leaked view a call would be 13 MiB


def test_the_module_links_no_torch_library():
    if shutil.which("ldd") is None or shutil.which("nm") is None:
        pytest.skip("needs ldd and nm")
    linked = subprocess.run(["ldd", _cpu.__file__], check=True, capture_output=True, text=True).stdout
    assert "libc.so" in linked
    for library in ("torch", "c10", "gomp", "python"):
        assert f"lib{library}" not in linked, linked
    wanted = subprocess.run(["nm", "-D", "--undefined-only", "-C", _cpu.__file__], check=True, capture_output=True, text=True)
    foreign = [line for line in wanted.stdout.splitlines() if any(f"{space}::" in line for space in ("c10", "at", "torch"))]
    assert not foreign


def test_the_module_exports_its_entry_point_only():
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    out = subprocess.run(["nm", "-D", "--defined-only", "-C", _cpu.__file__], check=True, capture_output=True, text=True).stdout
    names = [line.split(maxsplit=2)[2] for line in out.splitlines()]
    assert "PyInit__cpu" in names
    assert not [n for n in names if n.startswith("fastllm::")]
