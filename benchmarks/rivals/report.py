"""Tables from a results file of run.py, into the pages that keep a place for them.

    python -m benchmarks.rivals.report benchmarks/results/rivals-....json README.md docs/benchmarks.md

A page's place is between the lines `<!-- rivals -->` and `<!-- end of rivals -->`; with `<!-- rivals: all -->` it is given the
contexts, the batches, the plots of plots.py and the versions too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastllm.measure.report import markdown, number

from .common import SHAPES

OURS = "fastllm"
SWEEPS = {"contexts": "decode at growing contexts, tokens/s", "batches": "decode of batches, tokens/s in total"}
DISTURBED = 0.05  # of all cores' time used by others
PLACE = re.compile(r"(?P<start><!-- rivals(?P<all>: all)? -->\n).*?(?P<end><!-- end of rivals -->)", re.DOTALL)


# ---------------------------------------------------------------- statistics


def summarise(records: Sequence[dict[str, Any]], limits: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a contestant and work: median and extremes over the rounds, ratios to the best rival, share of the limit: of what
    the machine gave just before and after each turn, where that was measured, else of ``limits``."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        key = tuple(record[name] for name in ("shape", "set", "work", "rival", "variant"))
        groups.setdefault(key, []).append(record)
    rows = []
    for (shape, kind, work, rival, variant), runs in groups.items():
        done = [record for record in runs if "tok_s" in record]
        rates = {record["round"]: record["tok_s"] for record in done}
        row: dict[str, Any] = {"shape": shape, "set": kind, "work": work, "rival": rival, "variant": variant}
        row |= {key: runs[0][key] for key in ("weights", "bits", "threads")} | {"rounds": rates}
        if rates:
            median = statistics.median(rates.values())
            row |= {"tok_s": median, "min": min(rates.values()), "max": max(rates.values())}
            row["share"] = statistics.median(share(record, work, record["tok_s"], limits | now(record)) for record in done)
            row["share_of_best"] = share(done[0], work, median, limits)
            row["round_trips"] = [trip for record in done if (trip := now(record).get("round_trip"))]
            row["peak_rss_mib"] = max(record["peak_rss_mib"] for record in done)
            row |= {key: done[0][key] for key in ("weights_bytes", "first_tokens")}
            row["others_cpu"] = max(record["others_cpu"] for record in done)
        if reasons := [record["error"] for record in runs if "error" in record]:
            row["reason"] = reasons[0]
        rows.append(row)
    for row in rows:
        peers = [r for r in rows if all(r[key] == row[key] for key in ("shape", "set", "work")) and r["rival"] != OURS]
        row["vs_best"] = ratio_to_best(row, peers)
        row["vs_best_same_bits"] = ratio_to_best(row, [peer for peer in peers if peer["bits"] == row["bits"]])
    return rows


def now(record: dict[str, Any]) -> dict[str, float]:
    """What the machine gave around a run: means of before and after."""
    before, after = record.get("machine", ({}, {}))
    return {key: (value + after[key]) / 2 for key, value in before.items() if value is not None and after[key] is not None}


def ratio_to_best(row: dict[str, Any], rivals: Sequence[dict[str, Any]]) -> float | None:
    """Of the rates in the same rounds, their median; the best is the rival with the highest median."""
    best = max(rivals, key=lambda rival: rival.get("tok_s", 0.0), default=None)
    if best is None:
        return None
    pairs = [rate / best["rounds"][turn] for turn, rate in row["rounds"].items() if turn in best["rounds"]]
    return statistics.median(pairs) if pairs else None


def share(record: dict[str, Any], work: str, rate: float, limits: dict[str, Any]) -> float:
    """Decode: bytes of all weights that a step reads, of the read bandwidth. Prefill: multiplications and additions with the
    weights, of the peak of byte dot products, or of bytes by 4 bits, which is higher where there is no VNNI."""
    shape = SHAPES[record["shape"]]
    if work.startswith("decode"):
        batch = int(work.partition("batch ")[2] or 1)
        read = shape.layer_weights * record["layer_bytes"] + shape.head_weights * record["head_bytes"]
        return rate / batch * read / (limits["read_memory"] * 1e9)
    tokens = int(work.removeprefix("prefill "))
    peak = limits["int4" if record["bits"] == 4 else "int8"]
    return rate * 2 * (shape.layer_weights + shape.head_weights / tokens) / (peak * 1e9)


# ---------------------------------------------------------------- tables


def tables(results: dict[str, Any], plots: str | None) -> str:
    """All of it where there is a place for plots, whose files' names start with ``plots``; else the standard works."""
    rows = results["rows"]
    limits = results["limits"]
    parts = [
        f"{results['machine']['processor']} ({limits['isa']}), {results['threads']} threads, {results['date']}, commit "
        f"{results['commit']}. Measured limits: {limits['read_memory']:.1f} GB/s "
        f"read from memory, {limits['int8']:.0f} GOP/s int8 dot products, {limits['int4']:.0f} of bytes by 4 bits at best; "
        "shares are of what the machine gave just before and after each turn. Random weights in the models' shapes."
    ]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        title = SHAPES[shape].title
        if mine := only(rows, shape, "standard"):
            parts += ["", f"**{title}'s shape**, {rounds_of(mine)}", "", standard(mine)]
            parts += ["", f"![{title}]({plots}-{shape}-standard.png)"] if plots else []
        for kind, what in SWEEPS.items() if plots else ():
            if mine := only(rows, shape, kind):
                parts += ["", f"**{title}'s shape**, {what}, {rounds_of(mine)}", "", sweep(mine)]
                parts += ["", f"![{title}, {what}]({plots}-{shape}-{kind}.png)"]
    if plots:
        parts += ["", "Versions: " + "; ".join(versions(results["runs"])) + "."]
    return "\n".join(parts) + "\n"


def only(rows: Iterable[dict[str, Any]], shape: str, kind: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["shape"] == shape and row["set"] == kind]


def rounds_of(rows: Iterable[dict[str, Any]]) -> str:
    counts = [len(row["rounds"]) for row in rows if row["rounds"]] or [0]
    few, many = min(counts), max(counts)
    return "one round" if many == 1 else f"medians of {many if few == many else f'{few} to {many}'} interleaved rounds"


def contestants(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """(rival, variant) -> its rows by work, the fastest in the last work first."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["rival"], row["variant"]), {})[row["work"]] = row
    works = list(dict.fromkeys(row["work"] for row in rows))
    return dict(sorted(found.items(), key=lambda item: -item[1][works[-1]].get("tok_s", 0.0)))


def standard(rows: Sequence[dict[str, Any]]) -> str:
    """Prefill and decode side by side, with what they are shares of; who could not run says why."""
    works = list(dict.fromkeys(row["work"] for row in rows))
    columns = ["engine", "weights"]
    for work in works:
        limit = "read limit" if work.startswith("decode") else "dot product peak"
        columns += [f"{work}, tokens/s", "min to max", "x best rival", f"of {limit}"]
    lines, reasons = [], []
    for (rival, _), by_work in contestants(rows).items():
        first = next(iter(by_work.values()))
        if missing := [row for row in by_work.values() if "tok_s" not in row]:
            reasons.append(f"- {rival}, {first['weights']}: {missing[0]['reason']}")
            continue
        line: list[Any] = [label(first), first["weights"]]
        for work in works:
            row = by_work[work]
            span = f"{number(row['min'])} to {number(row['max'])}"
            ratio = "-" if row["vs_best"] is None else f"{row['vs_best']:.2f}"
            line += [row["tok_s"], span, ratio, f"{row['share']:.0%}"]
        lines.append([*line, f"{by_work[works[-1]]['peak_rss_mib']:.0f}"])
    text = markdown([*columns, "peak MiB"], lines, left=2)
    if any(row.get("others_cpu", 0) >= DISTURBED for row in rows):
        text += "\n\n\\* others used more than 5 % of the machine during a turn."
    return text + ("\n\nNot measured:\n\n" + "\n".join(reasons) if reasons else "")


def label(row: dict[str, Any]) -> str:
    """Ours in bold; the number of threads where it is another than the others'; a star for a disturbed run."""
    name = f"**{row['rival']}**" if row["rival"] == OURS else row["rival"]
    if row["threads"]:
        name += f", {row['threads']} thread" + ("s" if row["threads"] > 1 else "")
    return name + ("\\*" if row.get("others_cpu", 0) >= DISTURBED else "")


def sweep(rows: Sequence[dict[str, Any]]) -> str:
    works = list(dict.fromkeys(row["work"] for row in rows))
    lines = []
    for by_work in contestants(rows).values():
        first = next(iter(by_work.values()))
        rates = [by_work[work].get("tok_s") for work in works]
        lines.append([label(first), first["weights"], *rates])
    return markdown(["engine", "weights", *works], lines, left=2)


def versions(records: Sequence[dict[str, Any]]) -> list[str]:
    return sorted({f"{name} {version}" for record in records for name, version in record.get("versions", {}).items()})


def insert(page: str, results: dict[str, Any], plots: str) -> str:
    """The page with the tables in its place."""
    return PLACE.sub(
        lambda place: f"{place['start']}\n{tables(results, plots if place['all'] else None)}\n{place['end']}", page
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("pages", type=Path, nargs="*", help="pages to fill (default: print the tables)")
    options = parser.parse_args()
    results = json.loads(options.results.read_text(encoding="utf-8"))
    for page in options.pages:
        plots = os.path.relpath(options.results.with_suffix(""), page.parent)
        page.write_text(insert(page.read_text(encoding="utf-8"), results, plots), encoding="utf-8")
    if not options.pages:
        print(tables(results, str(options.results.with_suffix(""))))


if __name__ == "__main__":
    main()
