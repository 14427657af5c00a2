"""Which launch a Triton kernel gets: the shipped one for this kind of GPU and shape, or what ``fastllm tune`` measured here.

A table is a function of the GPU and of a key made of the shape's few properties that matter; it is pure, so that ``builds()`` can
list every entry for GPUs that are not here. Nothing is ever tuned unasked: the same call gets the same launch, and so the same
bits, every time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["ASSUMED_GPU", "GPU", "LaunchTable", "asked", "gpu_of", "load_tuned", "tuned_file", "warps"]

Launch = dict[str, Any]  # compile-time values, num_warps and num_stages
Key = tuple[int | str, ...]


class GPU(NamedTuple):
    """A kind of GPU, as far as launches depend on it: NVIDIA's compute capability, or AMD's number (gfx942 is 9.4)."""

    major: int
    minor: int
    hip: bool = False

    @property
    def shared_bytes(self) -> int:
        """Of a block: CUDA C++ Programming Guide, table of technical specifications; 64 KiB of LDS on AMD's."""
        if self.hip:
            return 64 << 10
        sizes = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 1): 227, (10, 3): 227, (11, 0): 227}
        return sizes.get((self.major, self.minor), 99) << 10

    def __str__(self) -> str:
        return f"gfx{self.major}{self.minor}2" if self.hip else f"sm_{self.major}{self.minor}"


ASSUMED_GPU = GPU(9, 0)  # of a CUDA tensor where there is no GPU: a FakeTensor


@functools.cache
def _gpu(index: int) -> GPU:
    return GPU(*torch.cuda.get_device_capability(index), hip=torch.version.hip is not None)


def gpu_of(device: torch.device) -> GPU:
    """What a tensor of that device runs on."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ASSUMED_GPU
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


class LaunchTable:
    """The launches of one kernel.

    Args:
        kernel: its name in tuned files.
        shipped: (gpu, *key) -> launch.
        candidates: (gpu, *key) -> launches that ``fastllm tune`` tries beside the shipped one; all have its keys.
    """

    def __init__(self, kernel: str, shipped: Callable[..., Launch], candidates: Callable[..., Iterable[Launch]]) -> None:
        self.kernel, self.shipped, self.candidates = kernel, shipped, candidates
        self._chosen: dict[tuple[str, int | None, Key], Launch] = {}

    def __call__(self, device: torch.device, *key: int | str) -> Launch:
        """The launch of this key. Callers must not change it."""
        if _listeners:
            for heard in _listeners:
                heard[self.kernel, key] = self
        at = (device.type, device.index, key)
        if at not in self._chosen:
            launch = self.shipped(gpu_of(device), *key)
            self._chosen[at] = _tuned(device).get(text(self.kernel, key), launch) if device.type == "cuda" else launch
            if self._chosen[at].keys() != launch.keys():  # of another version
                self._chosen[at] = launch
        return self._chosen[at]

    @contextlib.contextmanager
    def using(self, device: torch.device, key: Key, launch: Launch) -> Iterator[None]:
        """Within the block this key gets that launch."""
        at = (device.type, device.index, key)
        before = self(device, *key)
        self._chosen[at] = launch
        try:
            yield
        finally:
            self._chosen[at] = before


_listeners: list[dict[tuple[str, Key], LaunchTable]] = []


@contextlib.contextmanager
def asked() -> Iterator[dict[tuple[str, Key], LaunchTable]]:
    """Notes which entries are asked for within the block: (kernel, key) -> table."""
    heard: dict[tuple[str, Key], LaunchTable] = {}
    _listeners.append(heard)
    try:
        yield heard
    finally:
        _listeners[:] = [other for other in _listeners if other is not heard]


def text(kernel: str, key: Key) -> str:
    """An entry's name in a tuned file."""
    return " ".join(map(str, (kernel, *key)))


# ---------------------------------------------------------------- what was tuned on this device


def tuned_file(device: torch.device) -> Path:
    """Where ``fastllm tune`` keeps what it found for that GPU: the user's cache directory, a file a device and Triton version."""
    import triton

    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()) if device.type == "cuda" else device.type
    return Path(base).expanduser() / "fastllm" / f"launches-{name}-triton-{triton.__version__}.json"


def load_tuned(file: Path) -> dict[str, Launch]:
    """Entry -> launch; nothing where the file is missing or is not what ``fastllm tune`` writes."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        kept = json.loads(file.read_text(encoding="utf-8"))
        return {
            entry: launch
            for entry, launch in kept.items()
            if isinstance(launch, dict) and all(isinstance(v, int) for v in launch.values())
        }
    return {}


@functools.cache
def _tuned(device: torch.device) -> dict[str, Launch]:
    return load_tuned(tuned_file(device)) if torch.cuda.is_available() else {}


def warps(launch: Launch, *counts: int) -> Iterator[Launch]:
    """The launch with those numbers of warps, where they differ from its own and a block can have them."""
    for count in counts:
        if 1 <= count <= 16 and count != launch["num_warps"]:
            yield {**launch, "num_warps": count}
