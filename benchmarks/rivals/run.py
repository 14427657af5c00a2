"""fastllm and its rivals in turns, every run in a fresh process, on an idle machine: `make bench-rivals`.

Rounds go over all rivals, forwards and backwards in turn, so that a machine that slows down slows all of them alike. A run during
which others used the machine is repeated. Results are written after each run, so one that is broken off keeps what it has; with
--add further works join the file of that day.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastllm.backends import info
from fastllm.measure.bench import commit
from fastllm.measure.limits import Limits, limits, limits_now, round_trip
from fastllm.measure.report import write_json

from . import environments, make_models
from .common import SHAPES, Job, Variant, Work, cpu_time, last_error, others_share
from .report import DISTURBED, summarise

ROOT = Path(__file__).parents[2]
RIVALS = ("fastllm", "llama_cpp", "ik_llama_cpp", "openvino", "onnxruntime", "ctranslate2", "pytorch")
WORKS = {
    "standard": (Work(512), Work(128, 64)),
    "contexts": tuple(Work(prompt, 64) for prompt in (128, 512, 2048, 4096, 8192)),
    "batches": tuple(Work(128, 64, batch) for batch in (1, 2, 4, 8, 16)),
}
ATTEMPTS, TIMEOUT = 3, 3600


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

    def run(self, threads: int) -> dict[str, Any]:
        """What its process answers."""
        environment = self.module.ENVIRONMENT
        python = environments.python(environment) if environment else sys.executable
        job = Job(self.shape, self.variant, self.details.threads or threads, WORKS[self.works])
        command = [str(python), "-m", f"{__package__}.{self.rival}", job.text()]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {TIMEOUT} s"}
        try:
            return json.loads(done.stdout)  # type: ignore[no-any-return]
        except json.JSONDecodeError:
            return {"error": f"ended with status {done.returncode}: {last_error(done.stderr)}"}


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


def in_turns(contestants: Sequence[Entry], rounds: int) -> Iterator[tuple[int, Entry]]:
    """(round, entry): there and back again."""
    for turn in range(rounds):
        for entry in contestants if turn % 2 == 0 else reversed(contestants):
            yield turn, entry


def wait_until_idle(patience: float) -> None:
    end = time.monotonic() + patience
    while time.monotonic() < end:
        before = cpu_time()
        time.sleep(1.0)
        if others_share(before, cpu_time()) < DISTURBED:
            return


def machine_now(threads: int) -> dict[str, float | None]:
    """What a row's share is of. Between two runs of one morning it was seen to double: see ``limits_now``."""
    now = limits_now(threads, seconds=0.5)
    return {"read_memory": now.read_memory, "int8": now.int8, "int4": now.int4, "round_trip": round_trip()}


def undisturbed(
    run: Callable[[], dict[str, Any]], machine: Callable[[], dict[str, float | None]], patience: float
) -> dict[str, Any]:
    """The run, repeated while others disturb it; the least disturbed one if all are. Without patience: as it comes. With what
    ``machine`` said just before and just after it."""
    attempts: list[dict[str, Any]] = []
    for _ in range(ATTEMPTS if patience else 1):
        wait_until_idle(patience)
        before = machine()
        answer = run()
        if "error" in answer:
            return answer
        answer["machine"] = [before, machine()]
        answer["others_cpu"] = max(work["others_cpu"] for work in answer["works"])
        attempts.append(answer)
        if answer["others_cpu"] < DISTURBED:
            break
    return min(attempts, key=lambda answer: answer["others_cpu"])


def play(
    contestants: Sequence[Entry],
    rounds: int,
    run: Callable[[Entry], dict[str, Any]],
    save: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """All rounds. Who fails says why in a record of its own, and is not asked again; the others go on."""
    records: list[dict[str, Any]] = []
    out: set[Entry] = set()
    for turn, entry in in_turns(contestants, rounds):
        if entry in out:
            continue
        answer = run(entry)
        if "error" in answer:
            out.add(entry)
            answer = {"works": [{"work": work.name} for work in WORKS[entry.works]], **answer}
        about = {"round": turn, "rival": entry.module.NAME, "variant": entry.variant, "shape": entry.shape, "set": entry.works}
        records.append({**about, **asdict(entry.details), **answer})
        save(records)
        print(f"{turn + 1}/{rounds} {entry.shape} {entry.rival}.{entry.variant} {entry.works}: {_brief(answer)}", flush=True)
    return records


def others_runs(records: Sequence[dict[str, Any]], contestants: Sequence[Entry]) -> list[dict[str, Any]]:
    """The records of a results file that these contestants do not replace."""
    again = {(entry.module.NAME, entry.variant, entry.shape, entry.works) for entry in contestants}
    return [r for r in records if (r["rival"], r["variant"], r["shape"], r["set"]) not in again]


def _brief(answer: dict[str, Any]) -> str:
    if "error" in answer:
        return str(answer["error"])
    rates = ", ".join(f"{work['work']} {work['tok_s']:.1f} tok/s" for work in answer["works"])
    note = f" (others used {answer['others_cpu']:.0%} of the machine)" if answer["others_cpu"] >= DISTURBED else ""
    return f"{rates}, {answer['peak_rss_mib']:.0f} MiB{note}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS), help="files, or file.variant (default: all)")
    parser.add_argument("--shapes", nargs="+", default=["135m", "1b"], choices=SHAPES)
    parser.add_argument("--works", nargs="+", default=["standard"], choices=WORKS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of all rivals (default: the cores)")
    parser.add_argument("--patience", type=float, default=120, help="seconds to wait for an idle machine; 0: measure as it is")
    parser.add_argument("--machine", help="its name in the file's name (default: the processor and the rung)")
    parser.add_argument(
        "--add", action="store_true", help="to the file of the same name, in place of what it has of these works"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    options = parser.parse_args()

    contestants = entries(options.rivals, options.shapes, options.works)
    refused = {entry: reason for entry in contestants if (reason := entry.refusal())}
    for shape in options.shapes:
        forms = {entry.details.source for entry in contestants if entry.shape == shape and entry not in refused}
        make_models.make(shape, sorted(forms))
    wait_until_idle(options.patience)
    fresh = options.patience > 0
    facts, limit = info(), limits(threads=options.threads, fresh=fresh)
    machine = options.machine or re.sub(r"\W+", "-", f"{facts['processor']} {limit.isa}".lower()).strip("-")
    date = time.strftime("%Y-%m-%d")
    results = {
        "machine": {key: facts[key] for key in ("processor", "python", "cpu")},
        "threads": options.threads,
        "date": date,
        "commit": commit(),
        "limits": asdict(limit),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"rivals-{machine}-{options.threads}-threads-{date}.json"

    kept: list[dict[str, Any]] = []
    if options.add and file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        results["limits"] = asdict(limit.better(Limits(**before["limits"])))
        if results["commit"] not in before["commit"].split(", "):
            results["commit"] = f"{before['commit']}, {results['commit']}"
        else:
            results["commit"] = before["commit"]
        kept = others_runs(before["runs"], contestants)

    def save(records: list[dict[str, Any]]) -> None:
        runs = kept + records
        write_json(file, {**results, "rows": summarise(runs, results["limits"]), "runs": runs})

    def run(entry: Entry) -> dict[str, Any]:
        if entry in refused:
            return {"error": refused[entry]}
        return undisturbed(lambda: entry.run(options.threads), lambda: machine_now(options.threads), options.patience)

    records = play(contestants, options.rounds, run, save)
    # Again: a limit is the best that was seen, and a neighbour may have had the machine the first time.
    results["limits"] = asdict(limits(threads=options.threads, fresh=fresh).better(Limits(**results["limits"])))
    save(records)
    print(file)


if __name__ == "__main__":
    main()
