"""What all rivals share: the shapes, the job that a rival's process gets, how it is timed, what it answers.

A rival's file is a program: `python -m benchmarks.rivals.llama_cpp JOB`, with a `Job` as JSON. It loads and warms up, then answers
each line that it reads, the place of a work in its job, with a line of JSON: what it measured, or {"error": a sentence}. It runs in
an environment of its own, so this file needs the standard library alone.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

# Models, conversions and environments: gigabytes, so not in the checkout.
HOME = Path(os.environ.get("FASTLLM_RIVALS") or Path.home() / ".cache" / "fastllm-rivals")

Tick = Callable[[], None]


# ---------------------------------------------------------------- shapes


@dataclass(frozen=True)
class Shape:
    """A model's sizes, by the names of its config.json."""

    title: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float
    tie_word_embeddings: bool
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 16384  # the longest context measured, and some more

    @property
    def layer_weights(self) -> int:
        """Weights of all layers' matrices: each token meets every one of them once."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads  # q and o, k and v
        return self.num_hidden_layers * self.hidden_size * (heads * self.head_dim + 3 * self.intermediate_size)

    @property
    def head_weights(self) -> int:
        """Weights of the output matrix, which only tokens that are asked for logits meet."""
        return self.hidden_size * self.vocab_size


SHAPES = {
    "135m": Shape("SmolLM2-135M", 576, 30, 9, 3, 64, 1536, 49152, 100000.0, True),
    "1b": Shape("Llama-3.2-1B", 2048, 16, 32, 8, 64, 8192, 128256, 500000.0, True),
    "8b": Shape("Llama-3.1-8B", 4096, 32, 32, 8, 128, 14336, 128256, 500000.0, False),
}


# ---------------------------------------------------------------- variants


@dataclass(frozen=True)
class Variant:
    """One way to run a rival.

    Args:
        source: the model that it reads: "hf", "q4_0" or "q8_0" (see make_models.py).
        weights: for people: how matrices are stored, and what activations become.
        bits: of a matrix's weights: rows of equal bits are compared with each other.
        layer_bytes, head_bytes: bytes a weight of the layers' matrices and of the output matrix, scales included: what a decode
            step has to read.
        threads: where the engine is best with another number than the others.
        in_pieces: it quantises a float checkpoint tensor by tensor, so that memory need not hold it.
    """

    source: str
    weights: str
    bits: int
    layer_bytes: float
    head_bytes: float
    threads: int | None = None
    in_pieces: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


# ggml's blocks of 32 weights: the integers and one fp16 scale.
Q4_0_BYTES, Q8_0_BYTES = 18 / 32, 34 / 32


# ---------------------------------------------------------------- a job


@dataclass(frozen=True)
class Work:
    """What is timed: `batch` prompts of `prompt` tokens, then `new_tokens` decode steps (0: only the prompts count)."""

    prompt: int
    new_tokens: int = 0
    batch: int = 1

    @property
    def name(self) -> str:
        if not self.new_tokens:
            return f"prefill {self.prompt}"
        return f"decode at {self.prompt}" + (f", batch {self.batch}" if self.batch > 1 else "")


@dataclass(frozen=True)
class Job:
    shape: str
    variant: str
    threads: int
    works: tuple[Work, ...]

    @classmethod
    def parse(cls, text: str) -> Job:
        values = json.loads(text)
        return cls(**{**values, "works": tuple(Work(**work) for work in values["works"])})

    def text(self) -> str:
        return json.dumps(asdict(self))

    @property
    def model(self) -> Path:
        return HOME / "models" / self.shape

    @property
    def capacity(self) -> int:
        """Positions that a sequence needs at most, in whole blocks of 64."""
        return -(-(max(work.prompt + work.new_tokens for work in self.works) + 1) // 64) * 64

    @property
    def batch(self) -> int:
        return max(work.batch for work in self.works)


class Engine(Protocol):
    """What a rival's file fills in: the constructor loads, and converts the model first where that was not done yet."""

    weights_bytes: int  # of the files that it loads

    def generate(self, prompts: list[list[int]], new_tokens: int, tick: Tick) -> list[list[int]]:
        """Greedy continuations, new_tokens + 1 each: `tick()` when the prompts' next tokens are known, and after each step."""


def prompt_ids(shape: str, work: Work) -> list[list[int]]:
    """The same for all engines. Ids of small numbers mean bytes and control tokens in the made-up vocabulary."""
    draw = random.Random(f"{work.prompt} {work.batch}")
    return [draw.choices(range(300, min(SHAPES[shape].vocab_size, 30000)), k=work.prompt) for _ in range(work.batch)]


def convert(job: Job, name: str, command: list[str]) -> Path:
    """The model as a rival's own converter writes it, once: a command of the rival's environment, with {source} and {target}."""
    target = job.model / name
    if not target.exists():
        beside = target.with_name(f"{name}.part")
        shutil.rmtree(beside, ignore_errors=True)
        places = {"source": str(job.model / "hf"), "target": str(beside), "cache": str(HOME / "cache")}
        program, *arguments = (part.format(**places) for part in command)
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [str(Path(sys.prefix) / program), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=offline,
            check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"its converter failed: {last_error(done.stdout)}")
        beside.rename(target)
    return target


def last_error(log: str) -> str:
    """The last line that speaks of an error; the last one where none does."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next(
        (line for line in reversed(lines) if re.search(r"error|assert", line, re.IGNORECASE)), (lines or ["no output"])[-1]
    )


def files_size(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


# ---------------------------------------------------------------- timing


def cpu_time() -> tuple[int, int, float]:
    """Since the start, in ticks: of all cores, of those that the hypervisor took and busy ones, and of this process."""
    with open("/proc/stat", encoding="ascii") as lines:
        user, nice, system, idle, iowait, irq, softirq, steal = map(int, lines.readline().split()[1:9])
    busy = user + nice + system + irq + softirq + steal
    return busy + idle + iowait, busy, sum(os.times()[:4]) * os.sysconf("SC_CLK_TCK")


def others_share(before: tuple[int, int, float], after: tuple[int, int, float]) -> float:
    """The share of all cores' time that went to others than this process, the hypervisor's theft among them."""
    total, busy, own = (b - a for a, b in zip(before, after))
    return max(0.0, busy - own) / total if total else 0.0


def peak_rss_mib() -> float:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


class Clock:
    """When each token was there."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def tick(self) -> None:
        self.ticks.append(time.perf_counter())


# Of one work in one turn: short, because a shared machine changes within seconds, and the next engine should still meet the same.
MIN_SECONDS, MAX_REPEATS = 1.0, 5


def measure(engine: Engine, shape: str, work: Work) -> dict[str, Any]:
    prompts = prompt_ids(shape, work)
    rates: list[float] = []
    spent, others, tokens = 0.0, 0.0, []
    while not rates or (spent < MIN_SECONDS and len(rates) < MAX_REPEATS):
        clock = Clock()
        before, start = cpu_time(), time.perf_counter()
        tokens = engine.generate(prompts, work.new_tokens, clock.tick)
        others = max(others, others_share(before, cpu_time()))
        ticks = clock.ticks
        if len(ticks) != work.new_tokens + 1:
            raise RuntimeError(f"{len(ticks)} tokens, expected {work.new_tokens + 1}")
        took = ticks[-1] - ticks[0] if work.new_tokens else ticks[0] - start
        rates.append(work.batch * (work.new_tokens or work.prompt) / took)
        spent += ticks[-1] - start
    return {
        "work": work.name,
        "tok_s": statistics.median(rates),
        "repeats": rates,
        "others_cpu": others,
        "peak_rss_mib": peak_rss_mib(),  # so far
        "first_tokens": tokens[0][:8],
    }


def warm_up(engine: Engine, job: Job) -> None:
    """Buffers, and what is compiled at the first sight of a batch. Long contexts bring nothing new but their length."""
    batches = {work.batch: work for work in reversed(job.works)}  # the first work of each batch
    for work in dict.fromkeys((*job.works[:2], *batches.values())):
        engine.generate(prompt_ids(job.shape, work), min(work.new_tokens, 8), lambda: None)


def serve(load: Callable[[Job], Engine], job: Job, questions: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Nothing but the number of bytes when the engine is ready; then what it measured, once a question."""
    try:
        engine = load(job)
        warm_up(engine, job)
        yield {"weights_bytes": engine.weights_bytes}
        for question in questions:
            yield measure(engine, job.shape, job.works[int(question)])
    except Exception as error:
        yield {"error": f"{type(error).__name__}: {error}"}


PR_SET_PDEATHSIG = 1


def main(load: Callable[[Job], Engine], packages: tuple[str, ...]) -> None:
    """A rival's program. Its packages' versions go into the first answer."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a stopped engine would outlive a harness that was killed
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to standard error
    about = {"versions": {name: found for name in packages if (found := _version(name))}}
    for answer in serve(load, Job.parse(sys.argv[1]), sys.stdin):
        answers.write(json.dumps(answer | about) + "\n")
        answers.flush()
        about = {}
    os._exit(0)  # some engines' threads never end


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
