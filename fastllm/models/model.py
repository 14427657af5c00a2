"""A model that takes and gives text: the thin LLaMA, its tokenizer and the generate loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import dtype_error, shape_error, type_error, value_error
from ..generation.loop import generate_ids
from ..generation.sampling import Sampling
from .llama import Llama
from .loaders import ModelConfig
from .tokenizer import Tokenizer

__all__ = ["LanguageModel"]

Messages = Sequence[Mapping[str, str]]


class LanguageModel:
    """What ``fastllm.load`` returns.

    Args:
        llama: the forward pass.
        tokenizer: None where the checkpoint has none; then only token ids go in and out.
        context: most tokens in a sequence.
    """

    def __init__(self, llama: Llama, tokenizer: Tokenizer | None, context: int) -> None:
        self.llama, self._tokenizer, self.context = llama, tokenizer, context

    @property
    def config(self) -> ModelConfig:
        return self.llama.config

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ValueError where the checkpoint had none."""
        if self._tokenizer is None:
            raise ValueError("generate: the checkpoint has no tokenizer, expected token ids in place of text")
        return self._tokenizer

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """Logits after every token: ids (B, T) int64 -> (B, T, V) in the model's dtype.

        Raises: TypeError for another dtype; ValueError for a shape, an id outside of the vocabulary, too many tokens.
        """
        return self.llama.head(self._hidden_states("logits", ids))

    @torch.inference_mode()
    def losses(self, ids: Tensor) -> Tensor:
        """Negative log-likelihood (nats) of every token but the first, given those before it: ids (B, T) -> (B, T - 1) fp32.

        The logits (B, T, V) are never held. exp of the mean is the perplexity (``fastllm.evaluation.quality``).

        Raises: as ``logits``.
        """
        hidden = self._hidden_states("losses", ids)
        return self.llama.losses(hidden[:, :-1], ids[:, 1:].to(self.llama.device, torch.int64))

    def _hidden_states(self, name: str, ids: Tensor) -> Tensor:
        """After the last norm, (B, T, hidden), of ids that were checked on behalf of ``name``."""
        if not isinstance(ids, Tensor):
            raise type_error(name, "ids", ids, "a torch.Tensor")
        if ids.dtype not in (torch.int64, torch.int32):
            raise dtype_error(name, "ids", ids.dtype, "torch.int64 or torch.int32")
        if ids.dim() != 2 or ids.numel() == 0:
            raise shape_error(name, "ids", ids.shape, "(B, T) with at least one token")
        if ids.shape[1] > self.context:
            raise shape_error(name, "ids", ids.shape, f"at most {self.context} tokens", "to fit the model's context")
        cache = self.llama.new_cache(ids.shape[0], ids.shape[1])
        return self.llama.hidden_states(ids.to(self.llama.device, torch.int64), cache)

    def generate(
        self,
        prompt: str | Sequence[str] | Messages | Tensor,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Any:
        """Continue a prompt; returns what was added, without the prompt.

        Args:
            prompt: a text -> a text; a list of texts -> a list of texts (one batch); chat messages
                (``[{"role": "user", "content": "..."}]``) -> the answer; token ids (T,) or (B, T) -> list(s) of token ids.
            max_new_tokens: at most this many tokens; the model's end-of-text tokens and the context end it sooner.
            temperature, top_k, top_p, min_p, repetition_penalty, seed: see ``Sampling``.
            stop: text(s) at which to end; they are not part of the result.

        Raises: ValueError for a value out of range, an empty prompt, one longer than the context; TypeError for another kind.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        stops = _stop_texts(stop)
        prompts, is_text, is_batch = self._encode(prompt)
        ids: list[list[int]] = [[] for _ in prompts]
        texts = [_Text(self.tokenizer, stops) for _ in prompts] if is_text else []
        for tokens in self._tokens(prompts, sampling, max_new_tokens):
            for b, token in enumerate(tokens):
                if token is not None:
                    ids[b].append(token)
                    if is_text:
                        texts[b].push(token)
            if is_text and stops and all(t.ended or token is None for t, token in zip(texts, tokens)):
                break
        results: list[Any] = [t.finish() for t in texts] if is_text else ids
        return results if is_batch else results[0]

    def stream(
        self, prompt: str | Messages, *, max_new_tokens: int = 128, stop: str | Sequence[str] = (), **options: Any
    ) -> Iterator[str]:
        """Like ``generate`` for one prompt, but yields pieces of text as they come; joined, they are what it returns."""
        sampling = Sampling(**options)
        prompts, is_text, is_batch = self._encode(prompt)
        if not is_text or is_batch:
            raise type_error("stream", "prompt", prompt, "a text or a list of chat messages")
        text = _Text(self.tokenizer, _stop_texts(stop))
        return self._stream(text, prompts, sampling, max_new_tokens)

    def _stream(self, text: _Text, prompts: list[list[int]], sampling: Sampling, max_new_tokens: int) -> Iterator[str]:
        for tokens in self._tokens(prompts, sampling, max_new_tokens):
            if tokens[0] is not None and (piece := text.push(tokens[0])):
                yield piece
            if text.ended:
                return
        if piece := text.rest():
            yield piece

    def _tokens(self, prompts: list[list[int]], sampling: Sampling, max_new_tokens: int) -> Iterator[list[int | None]]:
        stop_ids = self.config.eos_token_ids if self._tokenizer is None else self._tokenizer.eos_ids
        return generate_ids(
            self.llama, prompts, sampling, max_new_tokens=max_new_tokens, context=self.context, stop_ids=stop_ids
        )

    def _encode(self, prompt: Any) -> tuple[list[list[int]], bool, bool]:
        """(token ids a sequence, whether texts are wanted back, whether it is a batch)"""
        if isinstance(prompt, str):
            return [self._encode_text(prompt)], True, False
        if isinstance(prompt, Tensor):
            if prompt.dtype not in (torch.int64, torch.int32):
                raise dtype_error("generate", "prompt", prompt.dtype, "torch.int64 or torch.int32")
            if prompt.dim() not in (1, 2):
                raise shape_error("generate", "prompt", prompt.shape, "(T,) or (B, T)")
            rows = prompt.reshape(-1, prompt.shape[-1]).tolist()
            return rows, False, prompt.dim() == 2
        if isinstance(prompt, Sequence) and prompt and all(isinstance(p, str) for p in prompt):
            return [self._encode_text(p) for p in prompt], True, True
        if isinstance(prompt, Sequence) and prompt and all(isinstance(p, Mapping) for p in prompt):
            # The template writes the special tokens itself.
            text = self.tokenizer.apply_chat([dict(m) for m in prompt])
            return [self.tokenizer.encode(text, add_special_tokens=False)], True, False
        raise type_error("generate", "prompt", prompt, "a text, a list of texts, chat messages or token ids")

    def _encode_text(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        if not ids:
            raise value_error("generate", "prompt", text, "at least one token")
        return ids


def _stop_texts(stop: str | Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(s, str) and s for s in stops):
        raise value_error("generate", "stop", stop, "texts of at least one character")
    return stops


class _Text:
    """One sequence's text as it grows; holds back what may turn out to be the start of a stop text."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self._decoder = tokenizer.stream()
        self._stops = stops
        self._held, self._given = "", ""
        self.ended = False

    def push(self, token: int) -> str:
        """The text that is now certain."""
        return "" if self.ended else self._take(self._decoder.push(token), last=False)

    def rest(self) -> str:
        """What was held back, once nothing follows."""
        return "" if self.ended else self._take(self._decoder.finish(), last=True)

    def finish(self) -> str:
        """The whole text."""
        self.rest()
        return self._given

    def _take(self, new: str, last: bool) -> str:
        text = self._held + new
        found = [at for at in (text.find(s) for s in self._stops) if at >= 0]
        if found:
            self.ended = True
            text, held = text[: min(found)], ""
        else:
            hold = 0 if last else max((_overlap(text, s) for s in self._stops), default=0)
            text, held = text[: len(text) - hold], text[len(text) - hold :]
        self._held = held
        self._given += text
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that starts ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
