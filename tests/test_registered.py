"""Every op through the registered door: what compiles, traces, differentiates or intercepts must see it. No op is named here.

The ops are those that the cases' public calls reach, with the arguments that they were called with.
"""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastllm
from fastllm.measure.verify import all_cases, case_inputs, clone, results, to_float64
from fastllm.ops._explain import ops_reached
from fastllm.ops._op import OPS

LARGE = 256 << 10  # bytes of a case's inputs: these tests are about doors, not about numbers


def _tensors(value):
    """Itself, or those of a quantised weight or of int8 activations."""
    return (
        [value] if isinstance(value, Tensor) else [v for v in getattr(value, "__dict__", {}).values() if isinstance(v, Tensor)]
    )


def _collect():
    """The smallest call for each op, dtype, set of arguments that are there and of flags; and the cases that made them."""
    found = {}
    for spec in all_cases().values():
        for case in spec.cases:
            if case.bench or case.dtype == torch.float16:
                continue
            inputs = case_inputs(spec, case)
            tensors = [t for value in inputs.values() for t in _tensors(value)]
            size = sum(t.numel() * t.element_size() for t in tensors)
            empty = any(t.numel() == 0 for t in tensors)
            if size > LARGE:
                continue
            for op, args in ops_reached(spec.call, (), inputs):
                key = (op.name, *(a if isinstance(a, (bool, str)) else a is None for a in args), case.dtype, empty)
                if key not in found or size < found[key][0]:
                    call = pytest.param(op, args, id=f"{op.name}-{case.name}-{case.dtype}")
                    found[key] = (size, call, pytest.param(spec, case, id=f"{spec.op}-{case.name}-{case.dtype}"))
    public = {param.id: param for _, _, param in found.values()}
    return [call for _, call, _ in found.values()], list(public.values())


CALLS, PUBLIC = _collect()
FP32 = [p for p in CALLS if p.id.endswith("float32")]
PUBLIC_FP32 = [p for p in PUBLIC if p.id.endswith("float32")]
REFUSED = (RuntimeError, NotImplementedError)  # torch's and ours: a call that can't be right may say so


def copied(args):
    return tuple(clone(a) if isinstance(a, Tensor) else a for a in args)


def floats(args):
    return [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point() and a.numel()]


def replaced(args, i, value):
    return (*args[:i], value, *args[i + 1 :])


def state(op, args, out):
    """An op's results, and the arguments that it writes into."""
    written = [a for a, s in zip(args, op.registered._schema.arguments) if s.alias_info is not None and s.alias_info.is_write]
    return [t.detach() for t in (*results(out), *written) if t is not None]


def run(op, args):
    with torch.no_grad():
        args = copied(args)
        return state(op, args, op(*args))


def same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(torch.nan_to_num(a.double(), 1.5), torch.nan_to_num(b.double(), 1.5))


def test_every_op_is_here():
    assert {p.values[0].name for p in CALLS} == set(OPS)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("op", "args"), CALLS)
def test_opcheck(op, args, grad):
    """Schema, fake, strides, autograd registration, and AOT autograd with dynamic shapes."""
    if any(isinstance(a, Tensor) and a.numel() == 0 for a in args):
        pytest.skip("PyTorch's schema check itself cannot clone an empty view")
    args = copied(args)
    if grad:
        if op.registered._schema.is_mutable or all(_gradient(op, args, i) is None for i in floats(args)):
            pytest.skip("has no gradient")
        wanted = [i for i in floats(args) if _gradient(op, args, i) is not None]
        args = tuple(a.requires_grad_() if i in wanted else a for i, a in enumerate(args))
    torch.library.opcheck(op.registered, args)


def _gradient(op, args, i):
    """The gradient of the sum of the results with respect to argument i, or None where the op refuses in words."""
    args = replaced(copied(args), i, clone(args[i]).requires_grad_())
    try:
        out = results(op(*args))
        assert any(o.requires_grad for o in out), f"the gradient to argument {i} was dropped"
        total = sum(o.float().sum() for o in out if o.requires_grad)
        (found,) = torch.autograd.grad(total, args[i])
    except NotImplementedError as error:
        if not str(error).startswith(f"{op.name}: no gradient"):
            raise
        return None
    return found


@pytest.mark.parametrize(("op", "args"), FP32)
def test_a_gradient_arrives_or_is_refused_in_words(op, args):
    for i in floats(args):
        found = _gradient(op, args, i)
        assert found is None or (found.shape == args[i].shape and found.dtype == args[i].dtype)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("spec", "case"), PUBLIC_FP32)
def test_compiles_as_one_graph(spec, case, backend):
    torch._dynamo.reset()
    inputs, again = case_inputs(spec, case), case_inputs(spec, case)
    with torch.no_grad():
        eager = results(spec.call(**inputs))
        compiled = results(torch.compile(spec.call, fullgraph=True, backend=backend)(**again))
    same(eager, compiled)
    assert [t.stride() for t in eager] == [t.stride() for t in compiled]


@pytest.mark.parametrize(("op", "args"), CALLS)
def test_fake_tensors_have_the_real_shapes_and_strides(op, args):
    real = run(op, args)
    with FakeTensorMode() as mode:
        fakes = tree_map_only(Tensor, mode.from_tensor, args)
        fake = state(op, fakes, op(*fakes))
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.device, r.stride()) == (f.shape, f.dtype, f.device, f.stride())


def strides(t):
    """Those that mean something."""
    return [s for s, n in zip(t.stride(), t.shape) if n > 1] if t.numel() else []


@pytest.mark.parametrize(("op", "args"), CALLS)
def test_the_reference_backend_lays_out_as_the_fake_says(op, args):
    with fastllm.use_backend("reference"):
        reference = run(op, args)
    for r, y in zip(reference, run(op, args), strict=True):
        assert (r.shape, r.dtype, strides(r)) == (y.shape, y.dtype, strides(y))


@pytest.mark.parametrize(("op", "args"), FP32)
def test_vmap_is_right_or_refused(op, args):
    for i in floats(args):
        batch = torch.stack((args[i], args[i].flip(0), args[i] * 0.5))
        singles = [run(op, replaced(args, i, b)) for b in batch]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "falling back to a slow loop"
            try:
                inner = copied(args)
                out = torch.vmap(lambda x, i=i, inner=inner: op(*replaced(inner, i, x)))(batch.clone())
            except REFUSED:
                continue
        if op.registered._schema.is_mutable:
            pytest.fail("vmap of an op that writes must be refused")
        same([torch.stack(column) for column in zip(*singles)], list(results(out)))


@pytest.mark.parametrize(("op", "args"), FP32)
def test_functorch_grad_is_autograd_s_or_refused(op, args):
    for i in floats(args):
        expected = _gradient(op, args, i)
        inner = copied(args)
        try:
            found = torch.func.grad(lambda x, i=i, inner=inner: sum(o.sum() for o in results(op(*replaced(inner, i, x)))))(
                args[i]
            )
        except REFUSED:
            continue
        assert expected is not None, "functorch found a gradient where autograd refuses"
        same([expected], [found])


@pytest.mark.parametrize(("op", "args"), FP32)
def test_forward_mode_is_not_silently_dropped(op, args):
    for i in floats(args):
        inner = copied(args)
        with fwAD.dual_level():
            try:
                out = results(op(*replaced(inner, i, fwAD.make_dual(inner[i], torch.ones_like(inner[i])))))
            except REFUSED:
                continue
            assert all(fwAD.unpack_dual(o).tangent is not None for o in out), f"the tangent of argument {i} was dropped"


@pytest.mark.parametrize(("op", "args"), FP32)
def test_functorch_jvp_is_not_silently_dropped(op, args):
    for i in floats(args):
        inner = copied(args)
        with pytest.raises(REFUSED):
            torch.func.jvp(lambda x, i=i, inner=inner: op(*replaced(inner, i, x)), (inner[i],), (torch.ones_like(inner[i]),))


class Noting(Tensor):
    """A subclass that overrides __torch_function__, as most do."""

    seen: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs)


class Wrapper(Tensor):
    """A subclass that holds another tensor and has no memory of its own, as DTensor."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(Wrapper, lambda w: w.inner, (args, kwargs or {}))
        return tree_map_only(Tensor, cls, func(*args, **kwargs))


@pytest.mark.parametrize(("op", "args"), FP32)
def test_subclasses_are_not_bypassed(op, args):
    expected = run(op, args)
    with torch.no_grad():
        for i in floats(args):
            inner = copied(args)
            Noting.seen.clear()
            out = op(*replaced(inner, i, inner[i].as_subclass(Noting)))
            assert op.registered in Noting.seen, f"argument {i}: __torch_function__ was not asked"
            assert all(type(o) is Noting for o in results(out))
            same([o.as_subclass(Tensor) for o in results(out)], expected[: len(results(out))])
        inner = copied(args)
        wrapped = tuple(Wrapper(a) if isinstance(a, Tensor) else a for a in inner)
        out = results(op(*wrapped))
        assert all(type(o) is Wrapper for o in out)
        same(state(op, inner, tuple(o.inner for o in out)), expected)


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("op", "args"), FP32)
def test_modes_see_the_op(op, args):
    with Counting() as mode:
        out = run(op, args)
    assert op.registered in mode.seen
    same(out, run(op, args))


@pytest.mark.parametrize(("op", "args"), CALLS)
def test_inference_mode(op, args):
    expected = run(op, args)
    with torch.inference_mode():
        inner = copied(args)  # inference tensors, the written ones too
        out = op(*inner)
        assert all(o.is_inference() for o in results(out))
        same(state(op, inner, out), expected)


@pytest.mark.parametrize(("op", "args"), FP32)
def test_jit_trace_records_the_op(op, args):
    """The trace, run on other values, gives theirs: nothing was baked in."""
    i = floats(args)[0] if floats(args) else None
    if i is None:
        pytest.skip("empty")
    inner, other = copied(args), args[i].flip(0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda x: op(*replaced(inner, i, x)), (clone(args[i]),), check_trace=False)
        assert any(node.kind() == f"fastllm::{op.name}" for node in traced.graph.nodes())
        out = traced(clone(other))
    expected = run(op, replaced(args, i, other))
    same(list(results(out)), expected[: len(results(out))])


@pytest.mark.parametrize(("op", "args"), FP32)
def test_forced_backends(op, args):
    with pytest.raises(ValueError, match="use_backend: name is 'cudnn', expected one of"), fastllm.use_backend("cudnn"):
        pass
    for name in ("cuda", "triton", "torch"):
        with fastllm.use_backend(name), pytest.raises(NotImplementedError, match=f"^{op.name}: no backend .*{name}: "):
            run(op, args)
    with fastllm.use_backend("cpu"):
        if (why := next(b for b in op.backends if b.name == "cpu").refuse(*args)) is not None:
            with pytest.raises(NotImplementedError, match=re.escape(f"cpu: {why}")):
                run(op, args)
            return
        forced = run(op, args)
    same(forced, run(op, args))


@pytest.mark.parametrize(("spec", "case"), PUBLIC_FP32)
def test_the_reference_takes_float64(spec, case):
    """What the tolerance rule compares with is computed in float64 throughout."""
    inputs = {k: to_float64(v) for k, v in case_inputs(spec, case).items()}
    with torch.no_grad():
        assert all(y.dtype in (torch.float64, torch.int8, torch.uint8) for y in results(spec.reference(**inputs)))
