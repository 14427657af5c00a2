"""Disassembles the compiled module and tells which instructions the functions of each rung use.

    python tests/native/rungs.py            prints a table; exit status 1 if an instruction stands where it must not

A function of the baseline that uses AVX-512 kills the process on a machine without it. That happens where a rung's object
file defines a function that another rung, or the baseline, defines too (a template of the standard library, say): the linker
keeps one of them for all.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

RUNGS = ("baseline", "scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16")
# The lowest rung that may use an instruction, beside what its encoding says.
LOWEST_BY_NAME = {
    **dict.fromkeys(("vpdpbusd", "vpdpbusds", "vpdpwssd", "vpdpwssds"), "avx512_vnni"),
    **dict.fromkeys(("vdpbf16ps", "vcvtneps2bf16", "vcvtne2ps2bf16"), "avx512_bf16"),
}
_PREFIXES = {"66", "f2", "f3", "f0", "2e", "36", "3e", "26", "64", "65", "67"}
_RUNG_IN_SYMBOL = re.compile(r"7fastllm3cpu(?:6scalar|4avx2|6avx512|11avx512_vnni|11avx512_bf16)")


def rung_of_symbol(symbol: str) -> str:
    """The highest rung whose namespace stands in a mangled name: a template over a rung's type belongs to that rung."""
    found = [re.sub(r"^7fastllm3cpu\d+", "", name) for name in _RUNG_IN_SYMBOL.findall(symbol)]
    return max(found, key=RUNGS.index, default="baseline")


def rung_of_instruction(encoding: list[str], text: str) -> str:
    """The lowest rung that may execute it, from its first byte: in 64-bit code, 62 is always EVEX, and c4 and c5 always VEX."""
    named = LOWEST_BY_NAME.get(text.split(maxsplit=1)[0] if text else "")
    if named:
        return named
    opcode = next((byte for byte in encoding if byte not in _PREFIXES), "")
    if opcode == "62" or "%zmm" in text or re.search(r"%k[0-7]", text):
        return "avx512"
    return "avx2" if opcode in ("c4", "c5") or "%ymm" in text else "baseline"


def instructions(binary: Path) -> Iterator[tuple[str, list[str], str]]:
    """(symbol, encoded bytes, text) of every instruction of an object file or shared library."""
    listing = subprocess.run(["objdump", "-dw", str(binary)], check=True, capture_output=True, text=True).stdout
    symbol = ""
    for line in listing.splitlines():
        if line.endswith(">:"):
            symbol = line[line.index("<") + 1 : -2]
        elif "\t" in line:
            _, encoding, *text = line.split("\t")
            yield symbol, encoding.split(), text[0].strip() if text else ""


@dataclass
class Use:
    functions: set[str] = field(default_factory=set)
    instructions: int = 0
    vex: int = 0
    evex: int = 0
    widest: str = "xmm"


def survey(lines: Iterable[tuple[str, list[str], str]]) -> tuple[dict[str, Use], list[str]]:
    """What each rung uses, and a sentence for each function that uses more than its rung has."""
    uses = {rung: Use() for rung in RUNGS}
    worst: dict[str, tuple[str, str]] = {}
    for symbol, encoding, text in lines:
        rung, needed = rung_of_symbol(symbol), rung_of_instruction(encoding, text)
        use = uses[rung]
        use.functions.add(symbol)
        use.instructions += 1
        use.vex += needed == "avx2"
        use.evex += RUNGS.index(needed) > RUNGS.index("avx2")
        for register in ("zmm", "ymm"):
            if "%" + register in text:
                use.widest = max(use.widest, register, key=("xmm", "ymm", "zmm").index)
        if RUNGS.index(needed) > RUNGS.index(worst[symbol][0] if symbol in worst else rung):
            worst[symbol] = needed, text
    return uses, [
        f"{symbol} is of rung {rung_of_symbol(symbol)} and uses an instruction of {needed}: {text}"
        for symbol, (needed, text) in worst.items()
    ]


def leaks(objects: Iterable[Path]) -> list[str]:
    """A sentence for each function that a rung's object file offers to the linker outside of the rung's namespace."""
    found = []
    for path in objects:
        rung = path.name.split(".")[1]
        names = subprocess.run(["nm", "--defined-only", "-g", str(path)], check=True, capture_output=True, text=True).stdout
        for line in names.splitlines():
            _, kind, symbol = line.split(maxsplit=2)
            if kind in "TWi" and not symbol.startswith(f"_ZN7fastllm3cpu{len(rung)}{rung}"):
                found.append(f"{path.name} defines {symbol} with external linkage")
    return found


def rung_objects(build: Path) -> list[Path]:
    """The object files of one rung each, in a build directory."""
    return [p for p in sorted(build.glob("*.o")) if len(p.suffixes) == 2 and p.suffixes[0][1:] in RUNGS]


def table(uses: dict[str, Use]) -> str:
    lines = [f"{'rung':<12} {'functions':>9} {'instructions':>12} {'VEX':>8} {'EVEX':>8}  widest register"]
    for rung, use in uses.items():
        counts = f"{len(use.functions):>9} {use.instructions:>12} {use.vex:>8} {use.evex:>8}"
        lines.append(f"{rung:<12} {counts}  {use.widest if use.functions else '-'}")
    return "\n".join(lines)


def main() -> int:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from fastllm import _cpu

    uses, wrong = survey(instructions(Path(_cpu.__file__)))
    print(f"{_cpu.__file__}\n{table(uses)}")
    print("\n".join(wrong) or "no function uses an instruction above its rung")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
