"""The timing protocol: all contestants in one process, in turns, so that a disturbance hits them alike.

A turn of a warm row: one untimed call, which brings back what the others pushed out of the caches, then enough timed calls
in a row to last 100 us. A turn of a cold row: one timed call, on the next of more argument sets than the last-level cache
holds. Warmed up by time; repeated until the budget is spent. Ratios are medians of the pairs of one turn.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Timing", "in_turns", "ratio"]

MIN_TURNS, MAX_TURNS = 5, 400
BATCH_SECONDS = 100e-6


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one sample a turn, in order."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def p20(self) -> float:
        return quantile(self.samples, 0.2)

    @property
    def p80(self) -> float:
        return quantile(self.samples, 0.8)


def quantile(samples: Sequence[float], q: float) -> float:
    """The sample at that place in order, between two where it falls between."""
    ordered = sorted(samples)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def ratio(rival: Timing, ours: Timing) -> float:
    """How many times faster ours is: the median over the turns of rival / ours."""
    return statistics.median(r / o for r, o in zip(rival.samples, ours.samples))


def in_turns(
    calls: Mapping[str, Callable[..., Any]],
    argument_sets: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Mapping[str, Any]]],
    cold: bool = False,
    seconds: float = 0.6,
    warmup: float = 0.1,
    wait: Callable[[], Any] | None = None,
) -> dict[str, Timing]:
    """Time each callable on the same keyword arguments, in turns.

    Args:
        calls: the contestants by name.
        argument_sets: keyword arguments, or such sets for each contestant by name; a warm timing uses the first only, a cold
            one goes round all of them.
        cold: whether each call's arguments must come from memory.
        seconds: the budget for all contestants together; at least five turns are taken whatever they cost.
        warmup: seconds of calls before, for each contestant (at least one call).
        wait: called before the clock starts and before it stops: a GPU's ``synchronize``.
    """
    wait = wait or (lambda: None)
    own = {name: argument_sets[name] if isinstance(argument_sets, Mapping) else argument_sets for name in calls}
    batch = {}
    for name, call in calls.items():
        fastest, end = float("inf"), time.perf_counter() + warmup
        while True:
            start = time.perf_counter()
            call(**own[name][0])
            wait()
            now = time.perf_counter()
            fastest = min(fastest, now - start)
            if now >= end:
                break
        batch[name] = 1 if cold else max(1, round(BATCH_SECONDS / fastest))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    collecting, turn, used = gc.isenabled(), 0, 0
    gc.disable()  # a collection in the middle of a call would be charged to it
    try:
        end = time.perf_counter() + seconds
        while turn < MIN_TURNS or (turn < MAX_TURNS and time.perf_counter() < end):
            for name, call in calls.items():
                if cold:
                    used += 1
                    arguments = own[name][used % len(own[name])]
                else:
                    arguments = own[name][0]
                    call(**arguments)
                count = batch[name]
                wait()
                start = time.perf_counter()
                for _ in range(count):
                    call(**arguments)
                wait()
                samples[name].append((time.perf_counter() - start) / count)
            turn += 1
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}
