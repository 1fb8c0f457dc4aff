"""The OpenAI API's answers: from what the engine said to JSON objects, streamed and whole. Pure.

A ``Choice`` collects one answer; an ``Endpoint`` knows the object names and the shape of text and logprobs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine.types import BrownoutUsage, FinishReason, RequestOutput, TokenLogprob, Usage

MIN_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's value for a token that cannot be


class TokenTexts(Protocol):
    """What of a tokenizer logprobs need."""

    def token_text(self, token_id: int) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...


@dataclass(slots=True)
class Choice:
    """One answer of a response while it grows."""

    index: int
    text: str = ""
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    num_logprob_characters: int = 0  # of the tokens reported so far, for text_offset

    def take(self, output: RequestOutput) -> None:
        self.text += output.text
        if output.logprobs is not None:
            self.logprobs = (self.logprobs or []) + list(output.logprobs)
        self.finish_reason = output.finish_reason or self.finish_reason
        self.usage = output.usage or self.usage


@dataclass(frozen=True, slots=True)
class Endpoint(ABC):
    """Base of the two shapes. ``created_s`` is Unix time; ``prefix_texts`` go before each choice's text (echo)."""

    response_id: str
    model: str
    created_s: int
    tokens: TokenTexts
    prefix_texts: Sequence[str] = ()

    @abstractmethod
    def response(self, choices: Sequence[Choice], usage: Mapping[str, Any]) -> dict[str, Any]:
        """The whole answer, when it is not streamed."""

    @abstractmethod
    def chunk(self, choice: Choice, output: RequestOutput, first: bool) -> dict[str, Any]:
        """One streamed event; ``choice`` has not taken ``output`` yet."""

    @abstractmethod
    def usage_chunk(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """The last event before [DONE], if the client asked for usage."""

    def _envelope(self, kind: str, choices: list[dict[str, Any]], usage: Mapping[str, Any] | None) -> dict[str, Any]:
        return {
            "id": self.response_id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "choices": choices,
            "usage": usage,
        }

    def _prefix(self, choice: Choice) -> str:
        return self.prefix_texts[choice.index] if self.prefix_texts else ""


class ChatEndpoint(Endpoint):
    """chat.completion and chat.completion.chunk"""

    __slots__ = ()

    def response(self, choices: Sequence[Choice], usage: Mapping[str, Any]) -> dict[str, Any]:
        return self._envelope(
            "chat.completion",
            [
                {
                    "index": choice.index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": self._logprobs(choice.logprobs),
                    "finish_reason": _finish_reason(choice.finish_reason),
                }
                for choice in choices
            ],
            usage,
        )

    def chunk(self, choice: Choice, output: RequestOutput, first: bool) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if output.text or first:
            delta["content"] = output.text
        part = {
            "index": choice.index,
            "delta": delta,
            "logprobs": self._logprobs(output.logprobs),
            "finish_reason": _finish_reason(output.finish_reason),
        }
        return self._envelope("chat.completion.chunk", [part], None)

    def usage_chunk(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        return self._envelope("chat.completion.chunk", [], usage)

    def _logprobs(self, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        content = [
            {
                **self._entry(token.token_id, token.logprob),
                "top_logprobs": [self._entry(token_id, logprob) for token_id, logprob in token.top],
            }
            for token in logprobs
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.tokens.token_text(token_id),
            "logprob": max(logprob, MIN_LOGPROB),
            "bytes": list(self.tokens.token_bytes(token_id)),
        }


class CompletionEndpoint(Endpoint):
    """text_completion, whole and streamed"""

    __slots__ = ()

    def response(self, choices: Sequence[Choice], usage: Mapping[str, Any]) -> dict[str, Any]:
        parts = [
            {
                "index": choice.index,
                "text": self._prefix(choice) + choice.text,
                "logprobs": self._logprobs(choice, choice.logprobs),
                "finish_reason": _finish_reason(choice.finish_reason),
            }
            for choice in choices
        ]
        return self._envelope("text_completion", parts, usage)

    def chunk(self, choice: Choice, output: RequestOutput, first: bool) -> dict[str, Any]:
        part = {
            "index": choice.index,
            "text": (self._prefix(choice) if first else "") + output.text,
            "logprobs": self._logprobs(choice, output.logprobs),
            "finish_reason": _finish_reason(output.finish_reason),
        }
        return self._envelope("text_completion", [part], None)

    def usage_chunk(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        return self._envelope("text_completion", [], usage)

    def _logprobs(self, choice: Choice, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        shape = _CompletionLogprobs()
        for token in logprobs:
            text = self.tokens.token_text(token.token_id)
            shape.tokens.append(text)
            shape.token_logprobs.append(max(token.logprob, MIN_LOGPROB))
            alternatives = {token.token_id: token.logprob, **dict(token.top)}  # OpenAI always lists the chosen one
            shape.top_logprobs.append(
                {self.tokens.token_text(token_id): max(value, MIN_LOGPROB) for token_id, value in alternatives.items()}
            )
            shape.text_offset.append(choice.num_logprob_characters)
            choice.num_logprob_characters += len(text)
        return {
            "tokens": shape.tokens,
            "token_logprobs": shape.token_logprobs,
            "top_logprobs": shape.top_logprobs,
            "text_offset": shape.text_offset,
        }


@dataclass(slots=True)
class _CompletionLogprobs:
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[str, float]] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)


def usage_object(choices: Sequence[Choice], num_choices_per_prompt: int) -> dict[str, Any]:
    """Token counts and dimming over all choices; a prompt counts once however many answers it got."""
    usages = [choice.usage for choice in choices if choice.usage is not None]
    of_prompts = [choice.usage for choice in choices[::num_choices_per_prompt] if choice.usage is not None]
    num_prompt_tokens = sum(usage.prompt_tokens for usage in of_prompts)
    num_completion_tokens = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in of_prompts)},
        "brownout": brownout_object([usage.brownout for usage in usages], [_num_tokens(usage) for usage in usages]),
    }


def brownout_object(usages: Sequence[BrownoutUsage], num_tokens: Sequence[int]) -> dict[str, Any]:
    """How much a response was dimmed; ``level_mean`` weighs each choice by its computed tokens."""
    routed_pairs = sum(usage.routed_pairs for usage in usages)
    dimmed_pairs = sum(usage.dimmed_pairs for usage in usages)
    level_tokens = sum(usage.level_mean * count for usage, count in zip(usages, num_tokens, strict=True))
    return {
        "dimmed_share": dimmed_pairs / routed_pairs if routed_pairs else 0.0,
        "routed_pairs": routed_pairs,
        "dimmed_pairs": dimmed_pairs,
        "level_peak": max((usage.level_peak for usage in usages), default=0),
        "level_mean": level_tokens / max(1, sum(num_tokens)),
        "setting_version": max((usage.setting_version for usage in usages), default=0),
    }


def _num_tokens(usage: Usage) -> int:
    return usage.prompt_tokens - usage.cached_tokens + usage.completion_tokens


def _finish_reason(reason: FinishReason | None) -> str | None:
    """OpenAI knows "stop" and "length" of ours; the others never end a delivered answer."""
    return None if reason is None else reason.value
