"""Tables for people and JSON for programs."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["markdown", "number", "print_table", "progress", "write_json"]


def write_json(path: str | Path, data: Any) -> None:
    """Writes beside the file and renames, so that no reader ever sees half of it. Infinities and NaN become null."""
    path = Path(path)
    text = json.dumps(_finite(data), indent=1, ensure_ascii=False) + "\n"
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(beside, 0o666 & ~umask)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: Any, digits: int = 3) -> str:
    """A float with three significant digits, no exponent where it can be helped; "-" for nothing; else what it is."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if not isinstance(value, float):
        return str(value)
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    size = math.floor(math.log10(abs(value)))
    if not -4 < size < 7:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(digits - 1 - size, 0)}f}"


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1, fold: Sequence[int] = ()
) -> None:
    """A table on standard output: the first ``left`` columns are words, the others numbers.

    On a narrow terminal the columns in ``fold`` are folded and no other; in a pipe, which has no width, nothing is.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [[number(cell) for cell in row] for row in rows]
    console = Console(highlight=False)
    widths = [max(map(len, column)) for column in zip(columns, *cells)]
    folded = [min(width, 16) if i in fold else width for i, width in enumerate(widths)]
    needed = sum(folded if console.is_terminal else widths) + 2 * len(widths) + 2
    console.width = max(needed, console.width if console.is_terminal else len(title))
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(
            column,
            justify="left" if i < left or i in fold else "right",
            overflow="fold",
            no_wrap=i not in fold,
            min_width=folded[i],
        )
    for row in cells:
        table.add_row(*map(Text, row))
    console.print(table)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> str:
    """The same table for a README or an issue."""
    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join("---" if i < left else "---:" for i in range(len(columns))) + "|",
    ]
    lines += ["| " + " | ".join(number(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


@contextmanager
def progress(what: str, total: int) -> Iterator[Any]:
    """A bar on stderr that is there while the context lasts; call what it yields with each step's name.

    Shown on a terminal only, and gone afterwards: what a program reads is not disturbed.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        started = False

        def step(name: str) -> None:
            nonlocal started
            bar.update(task, description=f"{what} {name}", advance=1 if started else 0)
            started = True

        yield step
