"""Text <-> token ids, from a tokenizer.json or from the metadata of a GGUF file, and chat templates."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from fastllm.errors import type_error, value_error

__all__ = ["StreamDecoder", "Tokenizer", "tokenizer_from_gguf", "tokenizer_from_hf"]

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# What llama.cpp does where a file names no pre-tokeniser: each pattern splits what the one before left.
DEFAULT_SPLITS = (r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]")
PRE_TOKENIZERS = {
    "smollm": "smollm",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
    "gpt-2": "gpt2",
    "gpt2": "gpt2",
    "default": "default",
}
# tokenizer.ggml.token_type
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
MAX_PIECE = 1024  # characters of a sentencepiece piece: finding its merges takes a step for each place to cut it
REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no UTF-8, or none yet


class Tokenizer:
    """Encode and decode with a ``tokenizers.Tokenizer``; know the model's special tokens and its chat template."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        chat_template: str | None = None,
    ) -> None:
        # A tokenizer.json may carry the padding and truncation of its training run: they would cut texts in silence.
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self.chat_template = chat_template
        self.special_ids = frozenset(id for id, token in backend.get_added_tokens_decoder().items() if token.special)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; special tokens written out in it are recognised.

        ``add_special_tokens`` adds those that the model expects around a text, e.g. its BOS.
        """
        if not isinstance(text, str):
            raise type_error("encode", "text", text, "a str")
        with _in_words("encode", "the tokenizer", "able to encode the text"):
            return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
        ids = list(ids)
        for id in ids:
            if isinstance(id, bool) or not isinstance(id, int):
                raise type_error("decode", "an element of ids", id, "an int")
            if not 0 <= id < 1 << 32:
                raise value_error("decode", "an element of ids", id, "from 0 to 4294967295")
        with _in_words("decode", "the tokenizer", "able to decode the ids"):
            return str(self.backend.decode(ids, skip_special_tokens=skip_special_tokens))

    def stream(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder to which ids are pushed one by one."""
        return StreamDecoder(self, skip_special_tokens)

    def apply_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any) -> str:
        """Render messages ({"role": ..., "content": ...}) with the model's chat template.

        Encode the result with ``add_special_tokens=False``: a template writes its BOS itself.

        Raises: ValueError without a template, or with the template's own words where it refuses the messages.
        """
        if self.chat_template is None:
            raise value_error("apply_chat", "chat_template", None, "a template", "the checkpoint carries none")
        variables = {
            "bos_token": self._text(self.bos_id),
            "eos_token": self._text(self.eos_ids[0] if self.eos_ids else None),
            "tools": None,
            **variables,
        }
        return _render(self.chat_template, messages=list(messages), add_generation_prompt=add_generation_prompt, **variables)

    def _text(self, id: int | None) -> str:
        token = None if id is None else self.backend.id_to_token(id)
        return "" if token is None else token


class StreamDecoder:
    """Detokenise one id at a time; a character is emitted when all of its bytes are there.

    The pieces joined equal ``decode`` of all ids, for ids of any text, and for any ids at all of a byte-level tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        # The ids since the last but one point at which the text was whole. The part before the last such point is kept
        # because decoders treat the first token apart (they strip its leading space).
        self._ids: list[int] = []
        self._settled = 0  # how many of them the last whole point covers
        self._emitted = 0  # characters of their text that are out

    def push(self, id: int) -> str:
        """Text that ``id`` completes, which may be empty."""
        if self._skip and id in self._tokenizer.special_ids:
            return ""
        text = self._tokenizer.decode([*self._ids, id], self._skip)
        self._ids.append(id)
        # All of them are held back: byte fallback judges a run of bytes as one, so each can still turn into a letter.
        whole = len(text.rstrip(REPLACEMENT))
        piece = text[self._emitted : whole]
        self._emitted = max(self._emitted, whole)
        if whole == len(text) and piece:
            del self._ids[: self._settled]
            self._settled = len(self._ids)
            self._emitted = len(self._tokenizer.decode(self._ids, self._skip))
        return piece

    def finish(self) -> str:
        """What is left, e.g. the replacement of a character that was cut off; the decoder starts afresh."""
        rest = self._tokenizer.decode(self._ids, self._skip)[self._emitted :]
        self._ids, self._settled, self._emitted = [], 0, 0
        return rest


def tokenizer_from_hf(
    data: bytes, options: Mapping[str, Any], *, eos_ids: Sequence[int] = (), where: str = "tokenizer.json"
) -> Tokenizer:
    """From the bytes of tokenizer.json and the content of tokenizer_config.json (which may be empty)."""
    op = "tokenizer"
    with _in_words(op, where, "a tokenizer.json"):
        backend = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    template = options.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, Mapping)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise type_error(op, "chat_template of tokenizer_config.json", template, "a string")
    bos, eos = (_special_id(backend, options, name) for name in ("bos_token", "eos_token"))
    if not eos_ids and eos is not None:
        eos_ids = (eos,)
    return Tokenizer(backend, bos_id=bos, eos_ids=eos_ids, chat_template=template)


def tokenizer_from_gguf(
    metadata: Mapping[str, Any], *, eos_ids: Sequence[int] | None = None, where: str = "the GGUF metadata"
) -> Tokenizer:
    """From the ``tokenizer.ggml.*`` metadata: byte-level BPE ("gpt2") or sentencepiece-like BPE ("llama").

    Raises: ValueError for another kind of tokenizer, an unknown pre-tokeniser, or inconsistent metadata.
    """
    op = "tokenizer"

    def get(key: str, kind: type, default: Any = None) -> Any:
        value = metadata.get(f"tokenizer.ggml.{key}", default)
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise type_error(op, f"tokenizer.ggml.{key} of {where}", value, f"{kind.__name__}")
        return value

    tokens = get("tokens", list)
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise value_error(op, f"tokenizer.ggml.tokens of {where}", "missing or no list of strings", "a vocabulary")
    types = get("token_type", list, [1] * len(tokens))
    if len(types) != len(tokens):
        raise value_error(op, f"tokenizer.ggml.token_type of {where}", f"{len(types)} long", f"{len(tokens)}, as tokens")
    vocab = {token: id for id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise value_error(op, f"tokenizer.ggml.tokens of {where}", "repeating itself", "each token once")
    ids = {name: get(f"{name}_token_id", int) for name in ("bos", "eos", "eot", "eom", "unknown")}
    for name, id in ids.items():
        if id is not None and not 0 <= id < len(tokens):
            raise value_error(op, f"tokenizer.ggml.{name}_token_id of {where}", id, f"0 to {len(tokens) - 1}")
    kind = get("model", str)
    with _in_words(op, where, "a tokenizer"):
        if kind == "gpt2":
            pre = get("pre", str, "default")
            if pre not in PRE_TOKENIZERS:
                raise value_error(op, f"tokenizer.ggml.pre of {where}", _short(pre), ", ".join(PRE_TOKENIZERS))
            backend = _byte_level_bpe(vocab, _merges(get("merges", list), vocab, where), PRE_TOKENIZERS[pre])
            add_bos = PRE_TOKENIZERS[pre] == "llama3"
        elif kind == "llama":
            scores = get("scores", list)
            if scores is None or len(scores) != len(tokens):
                raise value_error(op, f"tokenizer.ggml.scores of {where}", "missing or of another length", "as tokens")
            unknown = tokens[ids["unknown"]] if ids["unknown"] is not None else None
            backend = _sentencepiece_bpe(tokens, types, scores, unknown, get("add_space_prefix", bool, True), where)
            add_bos = True
        else:
            raise value_error(op, f"tokenizer.ggml.model of {where}", _short(str(kind)), "gpt2 or llama")
        special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
        backend.add_special_tokens([AddedToken(token, normalized=False) for token in special if token])
        defined = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
        backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in defined if token])
        _add_bos_eos(
            backend,
            tokens,
            ids["bos"] if get("add_bos_token", bool, add_bos) else None,
            ids["eos"] if get("add_eos_token", bool, False) else None,
            byte_level=kind == "gpt2",
        )
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise type_error(op, f"tokenizer.chat_template of {where}", template, "a string")
    if eos_ids is None:
        eos_ids = tuple(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None))
    return Tokenizer(backend, bos_id=ids["bos"], eos_ids=eos_ids, chat_template=template)


def _merges(lines: list[Any] | None, vocab: Mapping[str, int], where: str) -> list[tuple[str, str]]:
    """ "left right" -> pairs, each of them and their join in the vocabulary."""
    if lines is None or not all(isinstance(line, str) for line in lines):
        raise value_error("tokenizer", f"tokenizer.ggml.merges of {where}", "missing or no list of strings", "merges")
    pairs = []
    for line in lines:
        left, _, right = line.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise value_error(
                "tokenizer",
                f"a line of tokenizer.ggml.merges of {where}",
                _short(line),
                "two tokens that join to a third",
            )
        pairs.append((left, right))
    return pairs


def _byte_level_bpe(vocab: dict[str, int], merges: list[tuple[str, str]], pre: str) -> tokenizers.Tokenizer:
    # Llama 3 takes a word that is a token as it is, even where no chain of merges leads to it.
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama3"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pre == "smollm":
        splits = [pre_tokenizers.Digits(individual_digits=True), _split(GPT2_SPLIT)]
    elif pre == "default":
        splits = [_split(pattern) for pattern in DEFAULT_SPLITS]
    else:
        splits = [_split({"llama3": LLAMA3_SPLIT, "qwen2": QWEN2_SPLIT, "gpt2": GPT2_SPLIT}[pre])]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def _sentencepiece_bpe(
    tokens: list[str],
    types: list[Any],
    scores: list[Any],
    unknown: str | None,
    add_space_prefix: bool,
    where: str,
) -> tokenizers.Tokenizer:
    """Sentencepiece's BPE merges the neighbours whose join scores highest: each cut of a piece is a merge of its score."""
    op = "tokenizer"
    vocab = {token: id for id, token in enumerate(tokens)}
    longest = max(len(token) for token in tokens)
    if longest > MAX_PIECE:
        raise value_error(op, f"the longest token of {where}", f"{longest} characters", f"at most {MAX_PIECE}")
    merges = []
    for id, (piece, kind, score) in enumerate(zip(tokens, types, scores, strict=True)):
        if not isinstance(score, (int, float)) or math.isnan(score):
            raise value_error(op, f"score {id} of {where}", score, "a number")
        if kind in (UNKNOWN, CONTROL, USER_DEFINED, BYTE):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                merges.append((-score, id, left, right))
    merges.sort(key=lambda merge: merge[:2])
    byte_fallback = all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(left, right) for _, _, left, right in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )
    space = [normalizers.Prepend("\u2581")] if add_space_prefix else []
    backend.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(" ", 1, 0)] if add_space_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _add_bos_eos(
    backend: tokenizers.Tokenizer, tokens: list[str], bos: int | None, eos: int | None, *, byte_level: bool
) -> None:
    """Put BOS before and EOS behind each encoded text, where the metadata asks for it."""
    steps: list[Any] = [processors.ByteLevel(trim_offsets=False)] if byte_level else []
    if bos is not None or eos is not None:
        # the template's own names, because a token may hold characters that its syntax gives a meaning
        parts = (["[BOS]"] if bos is not None else []) + ["$A"] + (["[EOS]"] if eos is not None else [])
        known = [("[BOS]", bos), ("[EOS]", eos)]
        special = [{"id": name, "ids": [id], "tokens": [tokens[id]]} for name, id in known if id is not None]
        steps.append(processors.TemplateProcessing(single=parts, special_tokens=special))
    if steps:
        backend.post_processor = processors.Sequence(steps)


def _special_id(backend: tokenizers.Tokenizer, options: Mapping[str, Any], name: str) -> int | None:
    """Id of tokenizer_config.json's ``bos_token`` and the like: a string, or an object with ``content``."""
    token = options.get(name)
    if isinstance(token, Mapping):
        token = token.get("content")
    if token is None:
        return None
    if not isinstance(token, str):
        raise type_error("tokenizer", f"{name} of tokenizer_config.json", token, "a string or an object with content")
    with _in_words("tokenizer", f"{name} of tokenizer_config.json", "a token"):
        return backend.token_to_id(token)


def _render(template: str, **variables: Any) -> str:
    """Run a template in a sandbox: it comes out of a downloaded file."""
    import jinja2
    import jinja2.sandbox

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        # not jinja's own filter, which escapes for HTML
        return json.dumps(value, ensure_ascii=False, indent=indent)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    try:
        return environment.from_string(template).render(**variables)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        raise value_error("apply_chat", "the template's answer", _short(message), "a text") from None


@contextlib.contextmanager
def _in_words(op: str, arg: str, expected: str) -> Iterator[None]:
    """Failures of the tokenizers library as errors in words: it raises bare Exceptions, and Rust panics as no Exception."""
    try:
        yield
    except BaseException as error:
        is_ours = isinstance(error, (ValueError, TypeError)) and str(error).startswith(f"{op}: ")
        if is_ours or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise value_error(op, arg, _short(str(error)), expected) from None


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."
