"""Mutate checkpoints and read them: each must load, or be refused by a typed error in words.

    python tests/fuzz_loaders.py --seconds 600 [--seed 0]

Cases run in a worker process under a memory limit. A worker that dies, or is silent for 20 s, fails the case that it had
begun; the case number reproduces it: ``python tests/fuzz_loaders.py --worker --seed NUMBER --cases 1``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import re
import resource
import selectors
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

HANG_SECONDS = 20
MEMORY_LIMIT = 8 << 30  # bytes of address space: PyTorch alone reserves several GB
BATCH = 400  # cases a worker runs before a fresh one takes over
TYPED = (ValueError, TypeError, NotImplementedError, FileNotFoundError)
WORDS = re.compile(r"\w+: .+, expected .+", re.DOTALL)
INTEGERS = (0, 1, 2, 3, 7, 8, 31, 255, 1 << 16, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 32, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
VALUES = (
    None, True, False, -1, 0, 1, 3, 1 << 31, 1 << 63, 10**400, 0.5, -0.0, 1e308, math.nan, math.inf, "", "a", "\ud800",
    "x" * 5000, "../../etc/passwd", "model.safetensors", [], {}, [[]], [None], [1, "a"], {"a": {}}, list(range(50)),
)  # fmt: skip


def mutate_bytes(data: bytes, rng: random.Random, header: int) -> bytes:
    """A few local edits, most of them in the first ``header`` bytes, where sizes, types and offsets are."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        end = min(len(out), header) if rng.random() < 0.9 else len(out)
        at = rng.randrange(max(end, 1))
        kind = rng.randrange(8)
        if kind == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and out:
            out[at] = rng.choice((0, 1, 8, 127, 128, 255))
        elif kind == 2:
            out[at : at + 8] = struct.pack("<Q", rng.choice(INTEGERS))
        elif kind == 3:
            out[at : at + 4] = struct.pack("<I", rng.choice(INTEGERS) & 0xFFFFFFFF)
        elif kind == 4:
            del out[at : at + rng.choice((1, 4, 8, 100))]
        elif kind == 5:
            out[at:at] = rng.randbytes(rng.choice((1, 4, 8, 100)))
        elif kind == 6:
            out[at:at] = out[at : at + rng.choice((8, 64, 1000))]
        else:
            del out[rng.randrange(len(out) + 1) :]
    return bytes(out)


def mutate_gguf(data: bytes, rng: random.Random, header: int) -> bytes:
    """Edits at the places where a key or a tensor is described, or anywhere."""
    if rng.random() < 0.4:
        return mutate_bytes(data, rng, header)
    names = [match.end() for match in re.finditer(rb"(llama|qwen\d|general|tokenizer)\.[\w.]+|blk\.\d\.[\w.]+", data[:header])]
    at = rng.choice(names) if names else 24
    out = bytearray(data)
    kind = rng.randrange(4)
    if kind == 0:  # the type of the value, or the rank of the tensor
        out[at : at + 4] = struct.pack("<I", rng.choice((*range(14), 255, 1 << 31)))
    elif kind == 1:
        out[at + 4 : at + 8] = struct.pack("<I", rng.choice(INTEGERS) & 0xFFFFFFFF)
    elif kind == 2:
        out[at + 4 : at + 12] = struct.pack("<Q", rng.choice(INTEGERS))
    else:
        where = at + rng.choice((8, 12, 16, 20, 24))
        out[where : where + 8] = struct.pack("<Q", rng.choice(INTEGERS))
    return bytes(out)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Replace, delete or nest values of the tree; sometimes the text itself."""
    if rng.random() < 0.25:
        return mutate_bytes(data, rng, len(data))
    tree = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        node, path = tree, []
        while isinstance(node, (dict, list)) and node:
            key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            path.append((node, key))
            node = node[key]
            if rng.random() < 0.2:
                break
        if not path:
            break
        parent, key = path[-1]
        kind = rng.randrange(5)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[rng.choice(("type", "rope_scaling", "rope_parameters", "layer_types", "x"))] = copy.deepcopy(
                rng.choice(VALUES)
            )
        elif kind == 2 and isinstance(node, int) and not isinstance(node, bool):
            parent[key] = node + rng.choice((-1, 1, 7, 1 << 20))
        elif kind == 3:
            deep = node
            for _ in range(rng.choice((1, 5, 300))):
                deep = [deep]
            parent[key] = deep
        else:
            parent[key] = copy.deepcopy(rng.choice(VALUES))  # which a later step may change
    return json.dumps(tree).encode()


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Edit the JSON header and keep its length word right, or edit bytes."""
    size = struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.5:
        return mutate_bytes(data, rng, 8 + size)
    header = mutate_json(data[8 : 8 + size], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def exercise(path: Path) -> None:
    """All that a user does with a checkpoint short of running it."""
    from fastllm.models.loaders import read_checkpoint
    from fastllm.quant import QuantizedTensor

    checkpoint = read_checkpoint(path)
    for tensor in checkpoint.tensors.values():
        if isinstance(tensor, QuantizedTensor):
            tensor.pack()
    tokenizer = checkpoint.tokenizer()
    ids = tokenizer.encode("Hello the king, 1200 \u00e9\U0001f600 <|eos|>\n")
    stream = tokenizer.stream()
    for id in [*ids, *range(0, tokenizer.vocab_size, 7)][:200]:
        stream.push(id)
    stream.finish()
    tokenizer.decode(range(300))
    if tokenizer.chat_template is not None:
        tokenizer.apply_chat([{"role": "user", "content": "hi"}])


def write_bases(root: Path) -> list[Path]:
    """The unharmed checkpoints."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import numpy as np
    from test_loaders import hf_config, write_gguf, write_hf

    scores = [-float(i) for i in range(300)]
    write_gguf(root / "llama.gguf", hf_config("llama"), "Q4_1")
    write_gguf(root / "qwen2.gguf", hf_config("qwen2"), "Q8_0")
    write_gguf(root / "qwen3.gguf", hf_config("qwen3"), "F16")
    write_gguf(root / "factors.gguf", hf_config("llama"), "Q4_0", freqs=np.ones(8))
    write_gguf(root / "spm.gguf", hf_config("llama"), "BF16", extra=[("add_token_scores", scores)])
    spm = root / "spm.gguf"
    spm.write_bytes(spm.read_bytes().replace(b"\x04\x00\x00\x00\x00\x00\x00\x00gpt2", b"\x05\0\0\0\0\0\0\0llama", 1))
    write_hf(root / "hf", hf_config("llama"))
    write_hf(root / "hf_sharded", hf_config("qwen3"), shards=2)
    return sorted(root.iterdir())


def run_case(number: int, bases: list[Path], work: Path) -> str:
    """One mutated checkpoint; returns "ok", "refused" or the text of a failure."""
    rng = random.Random(number)
    base = rng.choice(bases)
    target = work / base.name
    if base.is_dir():
        shutil.copytree(base, target, dirs_exist_ok=True)
        victim = rng.choice(sorted(target.iterdir()))
        data = victim.read_bytes()
        victim.write_bytes(mutate_safetensors(data, rng) if victim.suffix == ".safetensors" else mutate_json(data, rng))
    else:
        data = base.read_bytes()
        header = data.rfind(b"output_norm.weight") + 100
        target.write_bytes(mutate_gguf(data, rng, header))
    try:
        exercise(target)
        return "ok"
    except BaseException as error:  # whatever comes out is what is under test
        if isinstance(error, KeyboardInterrupt):
            raise
        if type(error) in TYPED and WORDS.fullmatch(str(error)) and len(str(error)) < 2000:
            return "refused"
        where = "".join(traceback.format_tb(error.__traceback__)[-2:])
        return f"{type(error).__name__}: {str(error)[:300]} | {where}"


def worker(seed: int, cases: int) -> None:
    """Run cases ``seed`` to ``seed + cases``, one JSON line before and one after each."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    with tempfile.TemporaryDirectory() as folder:
        root, work = Path(folder) / "bases", Path(folder) / "work"
        root.mkdir()
        work.mkdir()
        bases = write_bases(root)
        for base in bases:
            exercise(base)
        for number in range(seed, seed + cases):
            print(json.dumps([number, None]), flush=True)
            print(json.dumps([number, run_case(number, bases, work)]), flush=True)


def start(seed: int) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--worker", "--seed", str(seed), "--cases", str(BATCH)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=BATCH)
    parser.add_argument("--worker", action="store_true")
    options = parser.parse_args()
    if options.worker:
        worker(options.seed, options.cases)
        return 0
    deadline, number = time.monotonic() + options.seconds, options.seed
    counts = {"ok": 0, "refused": 0}
    failures: dict[str, list[int]] = {}
    while time.monotonic() < deadline:
        process = start(number)
        if process.stdout is None:
            raise RuntimeError("fuzz_loaders: the worker has no stdout")
        selector = selectors.DefaultSelector()
        selector.register(process.stdout, selectors.EVENT_READ)
        begun, silence = None, 60.0  # a worker may take long to import and to write its bases
        while True:
            line = process.stdout.readline() if selector.select(silence) else None
            if not line:
                process.kill()
                code = process.wait()
                if begun is not None:
                    failures.setdefault("hang" if line is None else f"the process died, status {code}", []).append(begun)
                    number = begun + 1
                elif code != 0:
                    failures.setdefault("the worker failed before its first case", []).append(number)
                    deadline = 0.0
                break
            case, outcome = json.loads(line)
            if outcome is None:
                begun, silence = case, float(HANG_SECONDS)
                continue
            begun, number = None, case + 1
            if outcome in counts:
                counts[outcome] += 1
            else:
                failures.setdefault(outcome, []).append(case)
            if time.monotonic() > deadline:
                process.kill()
                process.wait()
                break
    total = sum(counts.values()) + sum(len(cases) for cases in failures.values())
    print(f"{total} cases: {counts['ok']} loaded, {counts['refused']} refused in words, {len(failures)} kinds of failure")
    for text, cases in failures.items():
        print(f"\ncases {cases[:5]} ({len(cases)} in all): {text}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
