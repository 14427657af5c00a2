"""Measures the launches that a Triton kernel may get on this GPU, and keeps the fastest: ``fastllm tune``.

A candidate is held to the tolerance rule before it is timed. Candidates and the shipped launch run in turns; the shipped one stays
unless another is faster by more than NOISE.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..ops._case import Case, OpCases
from ..ops._launch import GPU, Key, Launch, LaunchTable, asked, gpu_of, load_tuned, text, tuned_file
from .report import write_json
from .timing import Timing, in_turns_on_gpu
from .verify import device_of, expected, forced, run_case, to_device

__all__ = ["Tuned", "save", "tune_case"]

NOISE = 0.02

# Times contestants on argument sets of their own; the second result is a note.
Timer = Callable[..., tuple[Mapping[str, Timing], str]]


@dataclass(frozen=True)
class Tuned:
    """What measuring found for one entry of a launch table. Microseconds a call of the case that asked for it."""

    entry: str
    case: str
    shipped: Launch
    shipped_us: float
    best: Launch
    best_us: float
    tried: int
    wrong: int  # candidates that failed the tolerance rule
    failed: int  # candidates that could not be compiled or launched: too much shared memory, say

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def tune_case(
    spec: OpCases, case: Case, done: set[str], *, seconds: float = 1.0, timer: Timer = in_turns_on_gpu
) -> list[Tuned]:
    """Tunes every entry that the case asks for and that is not in ``done``, which is added to."""
    device = device_of("triton")
    inputs = to_device(expected(spec, case).inputs, device)
    found = []
    with forced("triton"), torch.no_grad():
        with asked() as entries:
            spec.call(**inputs)
        for (kernel, key), table in entries.items():
            entry = text(kernel, key)
            if entry not in done:
                done.add(entry)
                found.append(_tune_entry(spec, case, inputs, table, key, entry, seconds, timer))
    return found


def _tune_entry(
    spec: OpCases, case: Case, inputs: dict[str, Any], table: LaunchTable, key: Key, entry: str, seconds: float, timer: Timer
) -> Tuned:
    device = next(t.device for t in inputs.values() if isinstance(t, torch.Tensor))
    gpu: GPU = gpu_of(device)
    shipped = table.shipped(gpu, *key)
    right: list[Launch] = [shipped]
    tried = wrong = failed = 0
    for launch in table.candidates(gpu, *key):
        if launch == shipped:
            continue
        tried += 1
        try:
            with table.using(device, key, launch):
                ok = run_case(spec, case, device=device.type).ok
        except Exception:  # of Triton, its compiler or the driver: this launch is not for this GPU
            failed += 1
            continue
        wrong += not ok
        right += [launch] if ok else []

    def call(launch: Launch, **arguments: Any) -> Any:
        with table.using(device, key, launch):
            return spec.call(**arguments)

    calls = {str(i): functools.partial(call, launch) for i, launch in enumerate(right)}
    times, _ = timer(calls, {name: [inputs] for name in calls}, seconds=seconds)
    fastest = min(range(len(right)), key=lambda i: times[str(i)].median)
    if times[str(fastest)].median > (1 - NOISE) * times["0"].median:
        fastest = 0
    us = [times[name].median * 1e6 for name in ("0", str(fastest))]
    return Tuned(entry, case.name, shipped, us[0], right[fastest], us[1], tried, wrong, failed)


def save(tuned: Sequence[Tuned], device: torch.device) -> str:
    """Adds what was found to this device's file, which calls read from the next process on; returns the file's name."""
    file = tuned_file(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {**load_tuned(file), **{one.entry: one.best for one in tuned}})
    return str(file)
