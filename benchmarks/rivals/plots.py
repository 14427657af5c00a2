"""Plots from a results file of run.py, as PNG files beside it: bars of prefill and decode, and lines of decode against context.

    python -m benchmarks.rivals.plots benchmarks/results/rivals-....json

It runs in the environment `plots`, which has matplotlib and nothing of ours.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from .common import SHAPES

OURS, OTHERS = "#d1495b", "#8d99ae"
SHOWN = 8  # lines: more a reader cannot tell apart


def name(row: dict[str, Any]) -> str:
    threads = f", {row['threads']} thread" if row["threads"] else ""
    return f"{row['rival']}{threads}: {row['weights']}"


def bars(rows: list[dict[str, Any]], file: Path, title: str) -> None:
    """Prefill and decode side by side, the fastest on top; whiskers from minimum to maximum."""
    works = list(dict.fromkeys(row["work"] for row in rows))
    figure, axes = plt.subplots(1, len(works), figsize=(15, 0.8 + 0.32 * len(rows) / len(works)), layout="constrained")
    for axis, work in zip(axes, works):
        mine = sorted((row for row in rows if row["work"] == work), key=lambda row: row["tok_s"])
        rates = [row["tok_s"] for row in mine]
        spans = [[row["tok_s"] - row["min"] for row in mine], [row["max"] - row["tok_s"] for row in mine]]
        colours = [OURS if row["rival"] == "fastllm" else OTHERS for row in mine]
        axis.barh([name(row) for row in mine], rates, xerr=spans, color=colours, ecolor="#333333")
        axis.set_title(f"{title}: {work}, tokens/s")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


def place(row: dict[str, Any]) -> int:
    """Where a row stands on the axis: its context, or its batch."""
    context, _, batch = row["work"].removeprefix("decode at ").partition(", batch ")
    return int(context) if row["set"] == "contexts" else int(batch or 1)


def lines(rows: list[dict[str, Any]], file: Path, title: str) -> None:
    """Decode against context or batch, of the fastest."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(name(row), []).append(row)
    best = sorted(found.items(), key=lambda item: -max(row["tok_s"] for row in item[1]))[:SHOWN]
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    for label, mine in best:
        ours = mine[0]["rival"] == "fastllm"
        at, rates = [place(row) for row in mine], [row["tok_s"] for row in mine]
        axis.plot(at, rates, marker="o", label=label, linewidth=2.5 if ours else 1.3, linestyle="-" if ours else "--")
    axis.set_xscale("log", base=2)
    ticks = sorted({place(row) for row in rows})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_ylim(bottom=0)
    axis.set_title(title)
    axis.set_ylabel("tokens/s")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    file = parser.parse_args().results
    results = json.loads(file.read_text(encoding="utf-8"))
    rows = [row for row in results["rows"] if "tok_s" in row]
    draw = {"standard": bars, "contexts": lines, "batches": lines}
    titles = {"standard": "{}", "contexts": "{}: decode against context", "batches": "{}: decode against batch, total"}
    for shape in dict.fromkeys(row["shape"] for row in rows):
        for kind, plot in draw.items():
            if mine := [row for row in rows if (row["shape"], row["set"]) == (shape, kind)]:
                target = file.with_name(f"{file.stem}-{shape}-{kind}.png")
                plot(mine, target, titles[kind].format(SHAPES[shape].title))
                print(target)


if __name__ == "__main__":
    main()
