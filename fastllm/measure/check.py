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
    """What the rule found: whether it holds, both errors, the worst element and a sentence if it does not hold."""

    ok: bool
    error: float
    torch_error: float
    bound: float
    nmse: float
    torch_nmse: float
    why: str = ""


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def nmse(y: Tensor, r: Tensor) -> float:
    """Mean squared error over mean square; 0 where both are all zero."""
    power = float(r.square().sum())
    error = float((y - r).square().sum())
    return error / power if power else (0.0 if error == 0.0 else float("inf"))


def _worst(difference: Tensor) -> str:
    at = int(difference.flatten().argmax())
    return str(tuple(int(i) for i in torch.unravel_index(torch.tensor(at), difference.shape)))


def check(y: Tensor, r: Tensor, p: Tensor, *, factor: float = 2.0) -> Verdict:
    """Hold y to the rule, given the float64 reference r and PyTorch's own p. Shapes must agree; y's dtype sets u."""
    nothing = float("nan")
    if y.shape != r.shape:
        why = f"shape {tuple(y.shape)}, expected {tuple(r.shape)}"
        return Verdict(False, nothing, nothing, nothing, nothing, nothing, why)
    if not y.dtype.is_floating_point:
        wrong = int((y.to(torch.int64) != r.to(torch.int64)).sum())
        return Verdict(wrong == 0, float(wrong), 0.0, 0.0, 0.0, 0.0, f"{wrong} integers differ" if wrong else "")
    u = unit_roundoff(y.dtype)
    y, p = y.double(), p.double()
    if y.numel() == 0:
        return Verdict(True, 0.0, 0.0, 0.0, 0.0, 0.0)
    # Where PyTorch's own op overflows its dtype too, the overflow is the dtype's, not ours.
    differ = (y.isfinite() != r.isfinite()) & (y.isfinite() != p.isfinite())
    if bool(differ.any()):
        why = f"{int(differ.sum())} elements are not finite where they should be, or the reverse; one at "
        return Verdict(False, nothing, nothing, nothing, nothing, nothing, why + _worst(differ.int()))
    infinite = r.isinf() & y.isinf()
    if bool((y.sign() != r.sign())[infinite].any()):
        return Verdict(False, nothing, nothing, nothing, nothing, nothing, "an infinity has the wrong sign")
    both = r.isfinite() & y.isfinite() & p.isfinite()
    y, p, r = (t.where(both, torch.zeros((), dtype=torch.float64)) for t in (y, p, r))
    error, torch_error = float((y - r).abs().max()), float((p - r).abs().max())
    bound = factor * torch_error + u * float(r.abs().max())
    ours, theirs = nmse(y, r), nmse(p, r)
    why = ""
    if not error <= bound:
        why = f"max error {error:.3g} exceeds {bound:.3g}, worst at {_worst((y - r).abs())}"
    elif not ours <= factor * theirs + u * u:
        why = f"nmse {ours:.3g} exceeds {factor:g} x {theirs:.3g} + u^2"
    return Verdict(not why, error, torch_error, bound, ours, theirs, why)
