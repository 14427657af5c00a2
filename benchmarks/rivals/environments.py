"""One virtual environment a rival, from the package registry, in the versions of requirements/: `make rivals`.

An environment that is there in these very versions is left alone. One that cannot be built keeps its reason, for the rival's row,
and stops none of the others.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from .common import HOME, last_error

REQUIREMENTS = Path(__file__).parent / "requirements"
# What a package brings along and must go again: PyPI's torchvision is a CUDA build, which breaks imports beside a CPU PyTorch.
UNWANTED = {"openvino": ["torchvision"]}
NAMES = sorted(path.stem for path in REQUIREMENTS.glob("*.txt"))


def folder(name: str) -> Path:
    return HOME / "environments" / name


def python(name: str) -> Path:
    return folder(name) / "bin" / "python"


def missing(name: str) -> str | None:
    """Why a rival cannot run in that environment; None if it can."""
    failed, installed = folder(name) / "failed.txt", folder(name) / "installed.txt"
    if failed.exists():
        return f"not installed: {failed.read_text(encoding='utf-8')}"
    if not installed.exists():
        return "not installed: `make rivals` does it"
    if installed.read_text(encoding="utf-8") != (REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8"):
        return "installed in other versions: `make rivals` puts that right"
    return None


def build(name: str) -> None:
    """Make the environment; the reason why not is left in its failed.txt."""
    wanted, here = REQUIREMENTS / f"{name}.txt", folder(name)
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    log, versions = here / "pip.log", wanted.read_text(encoding="utf-8")
    with open(log, "w", encoding="utf-8") as out:
        for command in (
            [sys.executable, "-m", "venv", str(here)],
            [str(python(name)), "-m", "pip", "install", "--upgrade", "pip==26.3"],  # the same one, whatever Python brings
            [str(python(name)), "-m", "pip", "install", "-r", str(wanted)],
            *([str(python(name)), "-m", "pip", "uninstall", "--yes", package] for package in UNWANTED.get(name, ())),
        ):
            if subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode:
                (here / "failed.txt").write_text(last_error(log.read_text(encoding="utf-8")), encoding="utf-8")
                return
    (here / "installed.txt").write_text(versions, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (default: all)")
    for name in parser.parse_args().names or NAMES:
        if missing(name) is None:
            print(f"{name}: there", flush=True)
            continue
        print(f"{name}: installing into {folder(name)} ...", flush=True)
        start = time.monotonic()
        build(name)
        print(f"{name}: {missing(name) or 'ready'} ({time.monotonic() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
