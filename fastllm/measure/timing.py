"""The timing protocol: all contestants in one process, in turns, so that a disturbance hits them alike.

On a GPU a sample is a CUDA graph of many calls: what the GPU takes, not what Python and the driver take to launch it.

A turn of a warm row: untimed calls for 4 ms, which bring back what the others pushed out of the caches (one call does not: a last
level keeps the others' lines for several), then enough timed calls in a row to last 100 us. A turn of a cold row: one timed
call, on the next of more argument sets than the last-level cache holds. Warmed up by time; repeated until the budget is
spent. Ratios are medians of the pairs of one turn.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Timing", "in_turns", "in_turns_on_gpu", "ratio"]

MIN_TURNS, MAX_TURNS = 5, 400
BATCH_SECONDS = 100e-6
UNTIMED_SECONDS = 4e-3
GPU_BATCH_SECONDS, GPU_BATCH_CALLS = 2e-3, 100  # of a graph: its own launch costs some 10 us


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
) -> dict[str, Timing]:
    """Time each callable on the same keyword arguments, in turns.

    Args:
        calls: the contestants by name.
        argument_sets: keyword arguments, or such sets for each contestant by name; a warm timing uses the first only, a cold
            one goes round all of them.
        cold: whether each call's arguments must come from memory.
        seconds: the budget for all contestants together; at least five turns are taken whatever they cost.
        warmup: seconds of calls before, for each contestant (at least one call).
    """
    own = {name: argument_sets[name] if isinstance(argument_sets, Mapping) else argument_sets for name in calls}
    batch, untimed = {}, {}
    for name, call in calls.items():
        fastest, end = float("inf"), time.perf_counter() + warmup
        while True:
            start = time.perf_counter()
            call(**own[name][0])
            now = time.perf_counter()
            fastest = min(fastest, now - start)
            if now >= end:
                break
        batch[name] = 1 if cold else max(1, round(BATCH_SECONDS / fastest))
        untimed[name] = max(1, round(UNTIMED_SECONDS / fastest))
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
                    for _ in range(untimed[name]):
                        call(**arguments)
                count = batch[name]
                start = time.perf_counter()
                for _ in range(count):
                    call(**arguments)
                samples[name].append((time.perf_counter() - start) / count)
            turn += 1
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}


def in_turns_on_gpu(
    calls: Mapping[str, Callable[..., Any]],
    argument_sets: Mapping[str, Sequence[Mapping[str, Any]]],
    cold: bool = False,
    seconds: float = 0.6,
) -> tuple[dict[str, Timing], str]:
    """Like ``in_turns``, in GPU time: each contestant's calls are captured in a CUDA graph, and the graphs replayed in turns.

    A contestant that cannot be captured is called from Python; the second result says which, and why, or is "".
    """
    batches: dict[str, tuple[Callable[[], Any], int]] = {}
    notes = []
    for name, call in calls.items():
        sets = argument_sets[name] if cold else argument_sets[name][:1]
        count = _gpu_batch(call, sets)
        try:
            batches[name] = _captured(call, sets, count), count
        except Exception as error:  # a contestant's own affair: one that waits for the GPU, or allocates outside of the pool
            notes.append(f"{name} was timed without a CUDA graph: {type(error).__name__}: {error}".splitlines()[0])
            batches[name] = _repeated(call, sets, count), count
    samples: dict[str, list[float]] = {name: [] for name in calls}
    turn, end = 0, time.perf_counter() + seconds
    while turn < MIN_TURNS or (turn < MAX_TURNS and time.perf_counter() < end):
        for name, (run, count) in batches.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            run()
            stop.record()
            stop.synchronize()
            samples[name].append(start.elapsed_time(stop) * 1e-3 / count)
        turn += 1
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}, "; ".join(notes)


def _gpu_batch(call: Callable[..., Any], sets: Sequence[Mapping[str, Any]]) -> int:
    """How many calls last GPU_BATCH_SECONDS; all of the argument sets at least once."""
    for _ in range(3):  # compiles, allocates
        call(**sets[0])
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(5):
        call(**sets[i % len(sets)])
    torch.cuda.synchronize()
    each = (time.perf_counter() - start) / 5
    return max(len(sets), min(GPU_BATCH_CALLS, math.ceil(GPU_BATCH_SECONDS / each)))


def _repeated(call: Callable[..., Any], sets: Sequence[Mapping[str, Any]], count: int) -> Callable[[], Any]:
    def run() -> None:
        for i in range(count):
            call(**sets[i % len(sets)])

    return run


def _captured(call: Callable[..., Any], sets: Sequence[Mapping[str, Any]], count: int) -> Callable[[], Any]:
    run = _repeated(call, sets, count)
    side = torch.cuda.Stream()  # capture wants a warm-up on a stream of its own
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(**sets[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
