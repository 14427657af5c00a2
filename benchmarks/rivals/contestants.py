"""Who takes part, each in a process that loads once and stands still between its turns."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from . import environments
from .common import SHAPES, Job, Variant, Work, last_error

ROOT = Path(__file__).parents[2]
RIVALS = ("fastllm", "llama_cpp", "ik_llama_cpp", "openvino", "onnxruntime", "ctranslate2", "pytorch")
WORKS = {
    "standard": (Work(512), Work(128, 64)),
    "contexts": tuple(Work(prompt, 64) for prompt in (128, 512, 2048, 4096, 8192)),
    "batches": tuple(Work(128, 64, batch) for batch in (1, 2, 4, 8, 16)),
}
TIMEOUT = 3600  # seconds for an answer; the first includes a conversion


# ---------------------------------------------------------------- entries


@dataclass(frozen=True)
class Entry:
    """One contestant: a rival's variant on a shape, with a set of works."""

    rival: str  # the file
    variant: str
    shape: str
    works: str

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(f"{__package__}.{self.rival}")

    @property
    def details(self) -> Variant:
        return self.module.VARIANTS[self.variant]  # type: ignore[no-any-return]

    def refusal(self) -> str | None:
        """Why it is not even started."""
        if self.shape == "8b" and self.details.source == "hf" and not self.details.in_pieces:
            return "converting or holding 16 GB of bf16 weights takes more memory than this harness may use; it reads no GGUF"
        environment = self.module.ENVIRONMENT
        return environments.missing(environment) if environment else None

    @property
    def memory(self) -> int:
        """Bytes that must be free before it starts: generous, loading counted in."""
        shape, variant = SHAPES[self.shape], self.details
        stored = shape.layer_weights * variant.layer_bytes + shape.head_weights * variant.head_bytes
        whole = 2 * (shape.layer_weights + shape.head_weights) if variant.source == "hf" and not variant.in_pieces else 0
        return int(1.5 * max(stored, whole)) + (1 << 30)

    def command(self, threads: int) -> list[str]:
        environment = self.module.ENVIRONMENT
        python = environments.python(environment) if environment else sys.executable
        job = Job(self.shape, self.variant, self.details.threads or threads, WORKS[self.works])
        return [str(python), "-m", f"{__package__}.{self.rival}", job.text()]


def entries(rivals: Sequence[str], shapes: Sequence[str], works: Sequence[str]) -> list[Entry]:
    """All that the names stand for; a rival's name may go on with a variant's: pytorch.eager_bf16."""
    found = []
    for shape in shapes:
        for kind in works:
            for name in rivals:
                rival, _, variant = name.partition(".")
                if rival not in RIVALS:
                    raise SystemExit(f"rivals: {rival}, expected one of {', '.join(RIVALS)}")
                variants = importlib.import_module(f"{__package__}.{rival}").VARIANTS
                if variant and variant not in variants:
                    raise SystemExit(f"rivals: {name}, expected one of {', '.join(f'{rival}.{v}' for v in variants)}")
                found += [Entry(rival, v, shape, kind) for v in ([variant] if variant else variants)]
    return found


# ---------------------------------------------------------------- processes


class Process:
    """An engine that loads once. Between its turns all its threads are stopped: some engines' spin while they wait."""

    def __init__(self, command: Sequence[str]) -> None:
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (end() closes it)
        self.program = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            start_new_session=True,
        )  # fmt: skip
        self.about = self._answer()
        self.stop(signal.SIGSTOP)

    def ask(self, work: int) -> dict[str, Any]:
        """What it measures of its job's work, or why it cannot."""
        if "error" in self.about:
            return self.about
        self.stop(signal.SIGCONT)
        assert self.program.stdin
        with contextlib.suppress(BrokenPipeError):  # it has ended: its answer is why
            self.program.stdin.write(f"{work}\n")
            self.program.stdin.flush()
        answer = self._answer()
        self.stop(signal.SIGSTOP)
        return answer

    def _answer(self) -> dict[str, Any]:
        stdout = self.program.stdout
        assert stdout
        if not select.select([stdout], [], [], TIMEOUT)[0]:
            return {"error": f"not done after {TIMEOUT} s"}
        if line := stdout.readline():
            return json.loads(line)  # type: ignore[no-any-return]
        self.errors.seek(0)
        return {"error": f"ended with status {self.program.wait()}: {last_error(self.errors.read())}"}

    def stop(self, how: signal.Signals) -> None:
        """A signal to it and to whatever it started."""
        if self.program.poll() is None:
            os.killpg(self.program.pid, how)

    def end(self) -> None:
        self.stop(signal.SIGKILL)
        self.program.wait()
        for file in (self.program.stdin, self.program.stdout, self.errors):
            if file:
                with contextlib.suppress(BrokenPipeError):
                    file.close()


class Processes:
    """Those that are alive. Where memory lacks for a new one, those that were idle longest end; they load anew when asked again."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.alive: dict[Entry, Process] = {}  # the longest idle first

    def ask(self, entry: Entry, work: int) -> dict[str, Any]:
        process = self.alive.pop(entry, None)
        if process is None:
            while self.alive and available_memory() < entry.memory:
                self.alive.pop(next(iter(self.alive))).end()
            process = Process(entry.command(self.threads))
        self.alive[entry] = process
        return process.about | process.ask(work)

    def end(self) -> None:
        while self.alive:
            self.alive.popitem()[1].end()


def available_memory() -> int:
    with open("/proc/meminfo", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
