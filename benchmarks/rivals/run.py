"""fastllm and its rivals in turns of a second or two, on an otherwise idle machine: `make bench-rivals`.

Every engine has a process of its own, which loads once and is stopped while it is another's turn. A round goes work by work over
all engines, forwards and backwards in turn, so that a machine that changes changes for all of them alike. A turn during which
others used the machine is repeated. Results are written after each turn, so what is broken off keeps what it has; with --add
further works join the file of that day.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastllm.backends import info
from fastllm.measure.bench import commit
from fastllm.measure.limits import Limits, limits, limits_now, round_trip
from fastllm.measure.report import write_json

from . import make_models
from .common import SHAPES, cpu_time, others_share
from .contestants import RIVALS, ROOT, WORKS, Entry, Processes, entries
from .report import DISTURBED, summarise

ATTEMPTS = 3


def in_turns(contestants: Sequence[Entry], rounds: int) -> Iterator[tuple[int, Entry, int]]:
    """(round, entry, place of the work): there and back again over those of one shape and set, then the next ones."""
    for (_, kind), group in itertools.groupby(contestants, key=lambda entry: (entry.shape, entry.works)):
        mine = list(group)
        for turn, work in itertools.product(range(rounds), range(len(WORKS[kind]))):
            for entry in mine if turn % 2 == 0 else reversed(mine):
                yield turn, entry, work


def wait_until_idle(patience: float) -> None:
    end = time.monotonic() + patience
    while time.monotonic() < end:
        before = cpu_time()
        time.sleep(0.3)
        if others_share(before, cpu_time()) < DISTURBED:
            return


def machine_now(threads: int) -> dict[str, float | None]:
    """What a row's share is of. From one second to the next it was seen to double: see ``limits_now``."""
    now = limits_now(threads, seconds=0.1)
    return {"read_memory": now.read_memory, "int8": now.int8, "int4": now.int4, "round_trip": round_trip()}


def undisturbed(
    run: Callable[[], dict[str, Any]], machine: Callable[[], dict[str, float | None]], patience: float
) -> dict[str, Any]:
    """The turn, repeated while others disturb it; the least disturbed one if all are. Without patience: as it comes. With what
    ``machine`` said just before and just after it."""
    attempts: list[dict[str, Any]] = []
    for _ in range(ATTEMPTS if patience else 1):
        wait_until_idle(patience)
        before = machine()
        answer = run()
        if "error" in answer:
            return answer
        answer["machine"] = [before, machine()]
        attempts.append(answer)
        if answer["others_cpu"] < DISTURBED:
            break
    return min(attempts, key=lambda answer: answer["others_cpu"])


def play(
    contestants: Sequence[Entry],
    rounds: int,
    run: Callable[[Entry, int], dict[str, Any]],
    save: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """All rounds, a record a turn. Who fails says why, in a record a work, and is not asked again; the others go on."""
    records: list[dict[str, Any]] = []
    out: set[Entry] = set()
    for turn, entry, work in in_turns(contestants, rounds):
        if entry in out:
            continue
        answer = run(entry, work)
        works = WORKS[entry.works]
        if "error" in answer:
            out.add(entry)
        else:
            works = works[work : work + 1]
        about = {"round": turn, "rival": entry.module.NAME, "variant": entry.variant, "shape": entry.shape, "set": entry.works}
        records += [{**about, **asdict(entry.details), "work": measured.name, **answer} for measured in works]
        save(records)
        print(f"{turn + 1}/{rounds} {entry.shape} {entry.rival}.{entry.variant} {works[0].name}: {_brief(answer)}", flush=True)
    return records


def others_runs(records: Sequence[dict[str, Any]], contestants: Sequence[Entry]) -> list[dict[str, Any]]:
    """The records of a results file that these contestants do not replace."""
    again = {(entry.module.NAME, entry.variant, entry.shape, entry.works) for entry in contestants}
    return [r for r in records if (r["rival"], r["variant"], r["shape"], r["set"]) not in again]


def _brief(answer: dict[str, Any]) -> str:
    if "error" in answer:
        return str(answer["error"])
    note = f" (others used {answer['others_cpu']:.0%} of the machine)" if answer["others_cpu"] >= DISTURBED else ""
    return f"{answer['tok_s']:.1f} tok/s, {answer['peak_rss_mib']:.0f} MiB{note}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS), help="files, or file.variant (default: all)")
    parser.add_argument("--shapes", nargs="+", default=["135m", "1b"], choices=SHAPES)
    parser.add_argument("--works", nargs="+", default=["standard"], choices=WORKS)
    parser.add_argument("--rounds", type=int, default=10)
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

    processes = Processes(options.threads)

    def run(entry: Entry, work: int) -> dict[str, Any]:
        if entry in refused:
            return {"error": refused[entry]}
        if (entry.shape, entry.works) not in {(other.shape, other.works) for other in processes.alive}:
            processes.end()
        return undisturbed(lambda: processes.ask(entry, work), lambda: machine_now(options.threads), options.patience)

    try:
        records = play(contestants, options.rounds, run, save)
    finally:
        processes.end()
    # Again: a limit is the best that was seen, and a neighbour may have had the machine the first time.
    results["limits"] = asdict(limits(threads=options.threads, fresh=fresh).better(Limits(**results["limits"])))
    save(records)
    print(file)


if __name__ == "__main__":
    main()
