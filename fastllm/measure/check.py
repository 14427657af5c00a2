"""The tolerance rule: one function, used by tests and by ``fastllm verify``, with no literal anywhere else.

y = the op, r = the reference in float64 on the same, already rounded inputs, p = PyTorch's own way in the working dtype,
u = unit roundoff of the output dtype:

- worst element:  max|y - r| <= factor * max|p - r| + u max|r|
- whole tensor:   nmse(y, r) <= factor * nmse(p, r) + u^2, which catches a bias that the maximum hides

Integer outputs must be equal. Infinities and NaN must stand where the reference has them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Verdict", "check", "nmse", "unit_roundoff"]


@dataclass(frozen=True)
class Verdict:
    """What the rule found: whether it holds, our errors, PyTorch's, the bounds, and a sentence if it does not hold."""

    ok: bool
    error: float
    torch_error: float
    bound: float
    nmse: float
    torch_nmse: float
    nmse_bound: float
    why: str = ""

    @property
    def share(self) -> float:
        """How much of its bound the nearer of the two errors uses: above 1 the rule does not hold."""
        return max(_share(self.error, self.bound), _share(self.nmse, self.nmse_bound))

    @classmethod
    def failed(cls, why: str) -> Verdict:
        """There is nothing to measure: a wrong shape, a NaN, an exception."""
        nothing = float("nan")
        return cls(False, nothing, nothing, nothing, nothing, nothing, nothing, why)


def _share(error: float, bound: float) -> float:
    return error / bound if bound else (0.0 if error == 0.0 else float("inf"))


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def nmse(y: Tensor, r: Tensor) -> float:
    """Mean squared error over mean square; 0 where both are all zero."""
    power, error = _power(r), _power(y - r)
    return error / power if power else (0.0 if error == 0.0 else float("inf"))


def _power(t: Tensor) -> float:
    flat = t.flatten()
    return float(torch.dot(flat, flat))


def _largest(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t, float("inf")))


def _not_finite(y: Tensor, r: Tensor, p: Tensor) -> str:
    """What is wrong with y's infinities and NaN, if anything."""
    # Where PyTorch's own op overflows its dtype too, the overflow is the dtype's, not ours.
    differ = (y.isfinite() != r.isfinite()) & (y.isfinite() != p.isfinite())
    differ |= y.isnan() & ~r.isnan() & ~p.isnan()
    if bool(differ.any()):
        return (
            f"{int(differ.sum())} elements are not finite where they should be, or the reverse; one at {_worst(differ.int())}"
        )
    if bool((y.sign() != r.sign())[r.isinf() & y.isinf()].any()):
        return "an infinity has the wrong sign"
    return ""


def _worst(difference: Tensor) -> str:
    at = int(difference.flatten().argmax())
    return str(tuple(int(i) for i in torch.unravel_index(torch.tensor(at), difference.shape)))


def check(y: Tensor, r: Tensor, p: Tensor, *, factor: float = 2.0) -> Verdict:
    """Hold y to the rule, given the float64 reference r and PyTorch's own p. Shapes must agree; y's dtype sets u."""
    if y.shape != r.shape:
        return Verdict.failed(f"shape {tuple(y.shape)}, expected {tuple(r.shape)}")
    if not y.dtype.is_floating_point:
        wrong = int((y.to(torch.int64) != r.to(torch.int64)).sum())
        return Verdict(wrong == 0, float(wrong), 0.0, 0.0, 0.0, 0.0, 0.0, f"{wrong} integers differ" if wrong else "")
    if r.dtype != torch.float64:
        return Verdict.failed(f"the reference computed in {r.dtype}, expected torch.float64")
    u = unit_roundoff(y.dtype)
    y, p = y.double(), p.double()
    if y.numel() == 0:
        return Verdict(True, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    both = r.isfinite() & y.isfinite() & p.isfinite()
    if not bool(both.all()):
        why = _not_finite(y, r, p)
        if why:
            return Verdict.failed(why)
        y, p, r = (t.where(both, torch.zeros((), dtype=torch.float64)) for t in (y, p, r))
    error, torch_error = _largest(y - r), _largest(p - r)
    bound = factor * torch_error + u * _largest(r)
    ours, theirs = nmse(y, r), nmse(p, r)
    nmse_bound = factor * theirs + u * u
    why = ""
    if not error <= bound:
        why = f"max error {error:.3g} exceeds {bound:.3g}, worst at {_worst((y - r).abs())}"
    elif not ours <= nmse_bound:
        why = f"nmse {ours:.3g} exceeds {factor:g} x {theirs:.3g} + u^2"
    return Verdict(not why, error, torch_error, bound, ours, theirs, nmse_bound, why)
