"""A model that takes and gives text: the thin LLaMA, its tokenizer and the generate loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import dtype_error, shape_error, type_error, value_error
from ..generation.decode import borrowed_cache
from ..generation.loop import generate_ids
from ..generation.sampling import Sampling
from ..generation.speculative import DRAFT_TOKENS, Drafter, DraftModel, GenerationReport, PromptLookup
from .llama import Llama
from .loaders import ModelConfig
from .tokenizer import Tokenizer

__all__ = ["LanguageModel"]

Messages = Sequence[Mapping[str, str]]


class LanguageModel:
    """What ``fastllm.load`` returns.

    Args:
        llama: the forward pass.
        tokenizer: None where the checkpoint has none, or was loaded without; then only token ids go in and out.
        context: most tokens in a sequence.
    """

    def __init__(self, llama: Llama, tokenizer: Tokenizer | None, context: int) -> None:
        self.llama, self._tokenizer, self.context = llama, tokenizer, context

    @property
    def config(self) -> ModelConfig:
        return self.llama.config

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ValueError where the checkpoint had none, or was loaded without."""
        if self._tokenizer is None:
            raise ValueError("generate: the model has no tokenizer, expected token ids in place of text")
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
        with borrowed_cache(self.llama, *ids.shape) as cache:
            return self.llama.hidden_states(ids.to(self.llama.device, torch.int64), cache)

    def generate(
        self,
        prompt: str | Messages | Tensor | Sequence[str] | Sequence[Messages] | Sequence[Tensor],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        speculate: str | LanguageModel | None = None,
        draft_tokens: int = DRAFT_TOKENS,
        report: GenerationReport | None = None,
    ) -> Any:
        """Continue a prompt; returns what was added, without the prompt.

        Args:
            prompt: a text, or chat messages (``[{"role": "user", "content": "..."}]``) -> a text; token ids (T,) int64|int32 -> a list of
                token ids. A list of any of them, or token ids (B, T) -> a list of results: one batch, whose sequences end separately.
            max_new_tokens: at most this many tokens; the model's end-of-text tokens and the context end it sooner.
            temperature, top_k, top_p, min_p, repetition_penalty, seed: see ``Sampling``.
            stop: text(s) at which to end; they are not part of the result.
            speculate: "lookup" guesses the next tokens from the text so far, a smaller model of the same vocabulary by running ahead; this
                model checks them in one pass. Greedily the result is the same, and sampled it has the same distribution
                (``generation.speculative``; docs/numerics.md says where that is so to the bit).
            draft_tokens: at most so many guesses a pass, 1 to 15.
            report: is filled in: tokens, forward passes, guesses made and accepted.

        Raises: ValueError for a value out of range, an empty prompt, one longer than the context, a draft model with another vocabulary;
            TypeError for another kind.

        Numerics: greedily, a sequence of a batch gets what it would get alone, under the same conditions.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        stops = _stop_texts(stop)
        prompts, is_text, is_batch = self._encode(prompt)
        ids: list[list[int]] = [[] for _ in prompts]
        texts = [_Text(self.tokenizer, stops) for _ in prompts] if is_text else []
        for new in self._tokens(prompts, sampling, max_new_tokens, self._drafter(speculate), draft_tokens, report):
            for b, tokens in enumerate(new):
                ids[b] += tokens
                if is_text:
                    for token in tokens:
                        texts[b].push(token)
            if is_text and stops and all(t.ended or not tokens for t, tokens in zip(texts, new)):
                break
        results: list[Any] = [t.finish() for t in texts] if is_text else ids
        return results if is_batch else results[0]

    def stream(
        self,
        prompt: str | Messages,
        *,
        max_new_tokens: int = 128,
        stop: str | Sequence[str] = (),
        speculate: str | LanguageModel | None = None,
        draft_tokens: int = DRAFT_TOKENS,
        report: GenerationReport | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Like ``generate`` for one prompt, but yields pieces of text as they come; joined, they are what it returns."""
        sampling = Sampling(**options)
        prompts, is_text, is_batch = self._encode(prompt)
        if not is_text or is_batch:
            raise type_error("stream", "prompt", prompt, "a text or a list of chat messages")
        text = _Text(self.tokenizer, _stop_texts(stop))
        steps = self._tokens(prompts, sampling, max_new_tokens, self._drafter(speculate), draft_tokens, report)
        return self._stream(text, steps)

    def _stream(self, text: _Text, steps: Iterator[list[list[int]]]) -> Iterator[str]:
        for (tokens,) in steps:
            if piece := "".join([text.push(token) for token in tokens]):
                yield piece
            if text.ended:
                return
        if piece := text.rest():
            yield piece

    def _drafter(self, speculate: str | LanguageModel | None) -> Drafter | None:
        if speculate is None:
            return None
        if speculate == "lookup":
            return PromptLookup()
        if not isinstance(speculate, LanguageModel):
            raise value_error("generate", "speculate", speculate, "None, 'lookup' or a model")
        theirs, ours = speculate.config.vocab_size, self.config.vocab_size
        if theirs != ours:
            raise ValueError(f"generate: speculate has a vocabulary of {theirs} tokens, expected {ours}, the model's own")
        return DraftModel(speculate.llama, speculate.context)

    def _tokens(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        max_new_tokens: int,
        drafter: Drafter | None,
        draft_tokens: int,
        report: GenerationReport | None,
    ) -> Iterator[list[list[int]]]:
        return generate_ids(
            self.llama,
            prompts,
            sampling,
            max_new_tokens=max_new_tokens,
            context=self.context,
            stop_ids=self.config.eos_token_ids if self._tokenizer is None else self._tokenizer.eos_ids,
            drafter=drafter,
            draft_tokens=draft_tokens,
            report=report,
        )

    def _encode(self, prompt: Any) -> tuple[list[list[int]], bool, bool]:
        """(token ids a sequence, whether texts are wanted back, whether it is a batch)"""
        if isinstance(prompt, Tensor):
            if prompt.dim() not in (1, 2):
                raise shape_error("generate", "prompt", prompt.shape, "(T,) or (B, T)")
            return [self._encode_one(row) for row in prompt.reshape(-1, prompt.shape[-1])], False, prompt.dim() == 2
        if _is_one(prompt):
            return [self._encode_one(prompt)], True, False
        # All texts and chats, or all token ids.
        if isinstance(prompt, Sequence) and all(map(_is_one, prompt)) and len({isinstance(p, Tensor) for p in prompt}) == 1:
            return [self._encode_one(p) for p in prompt], not isinstance(prompt[0], Tensor), True
        raise type_error("generate", "prompt", prompt, "a text, chat messages, token ids, or a list of them")

    def _encode_one(self, prompt: Any) -> list[int]:
        if isinstance(prompt, Tensor):
            if prompt.dtype not in (torch.int64, torch.int32):
                raise dtype_error("generate", "prompt", prompt.dtype, "torch.int64 or torch.int32")
            ids: list[int] = prompt.tolist()
            return ids
        if isinstance(prompt, str):
            return self._encode_text(prompt)
        # The template writes the special tokens itself.
        return self.tokenizer.encode(self.tokenizer.apply_chat([dict(m) for m in prompt]), add_special_tokens=False)

    def _encode_text(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        if not ids:
            raise value_error("generate", "prompt", text, "at least one token")
        return ids


def _is_one(prompt: Any) -> bool:
    """Whether this is one text, one sequence of token ids, or one chat."""
    if isinstance(prompt, Tensor):
        return prompt.dim() == 1
    if isinstance(prompt, str):
        return True
    return isinstance(prompt, Sequence) and len(prompt) > 0 and all(isinstance(p, Mapping) for p in prompt)


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
