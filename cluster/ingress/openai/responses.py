"""The OpenAI API's answers: from what the engine said to JSON objects, streamed and whole. Pure.

A ``Choice`` collects one answer; an ``Endpoint`` knows the object names and the shape of text and logprobs: see
`chat_responses` and `completion_responses`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.ingress.openai.tool_calls import ToolCallParser
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
    prompt_ids: Sequence[int] = ()
    tool_parser: ToolCallParser | None = None
    text: str = ""
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: Sequence[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    usage: Usage | None = None
    token_ids: list[int] = field(default_factory=list)
    num_logprob_characters: int = 0  # of the tokens reported so far, for text_offset

    def take(self, output: RequestOutput) -> None:
        self.text += output.text
        self.token_ids += output.token_ids
        if output.logprobs is not None:
            self.logprobs = (self.logprobs or []) + list(output.logprobs)
        self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs
        self.finish_reason = output.finish_reason or self.finish_reason
        self.stop_reason = output.stop_reason if output.stop_reason is not None else self.stop_reason
        self.usage = output.usage or self.usage

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Endpoint(ABC):
    """Base of the two shapes. ``created_s`` is Unix time; ``prefix_texts`` go before each choice's text (echo);
    ``service_tier`` is repeated as the client asked for it. ``shows_ids``: token ids stand beside the text, as with
    vLLM's return_token_ids; ``names_by_id``: logprobs call a token token_id:N instead of by its text;
    ``shows_prompt_logprobs``: as with vLLM's prompt_logprobs.
    """

    response_id: str
    model: str
    created_s: int
    tokens: TokenTexts
    prefix_texts: Sequence[str] = ()
    service_tier: str | None = None
    shows_ids: bool = False
    names_by_id: bool = False
    shows_prompt_logprobs: bool = False

    @abstractmethod
    def response(self, choices: Sequence[Choice], usage: Mapping[str, Any]) -> dict[str, Any]:
        """The whole answer, when it is not streamed."""

    @abstractmethod
    def chunk(self, choice: Choice, output: RequestOutput, first: bool) -> dict[str, Any] | None:
        """One streamed event, None if there is nothing to say yet; ``choice`` has not taken ``output`` yet."""

    @abstractmethod
    def usage_chunk(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """The last event before [DONE], if the client asked for usage."""

    def _token(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.names_by_id else self.tokens.token_text(token_id)

    def _token_ids(self, token_ids: Sequence[int]) -> dict[str, list[int]]:
        return {"token_ids": list(token_ids)} if self.shows_ids else {}

    def _prompt_ids(self, choice: Choice) -> dict[str, list[int]]:
        return {"prompt_token_ids": list(choice.prompt_ids)} if self.shows_ids else {}

    def _prompt_logprobs(self, choice: Choice) -> dict[str, Any]:
        """Of each token of the prompt but the first, and of the likeliest there: id |-> logprob, rank, text."""
        if not self.shows_prompt_logprobs:
            return {}
        return {"prompt_logprobs": [token and self._ranked(token) for token in choice.prompt_logprobs or ()]}

    def _ranked(self, token: TokenLogprob) -> dict[str, dict[str, Any]]:
        likeliest = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(token.top, 1)]
        return {
            str(token_id): {
                "logprob": max(logprob, MIN_LOGPROB),
                "rank": rank,
                "decoded_token": self.tokens.token_text(token_id),
            }
            for token_id, logprob, rank in [*likeliest, (token.token_id, token.logprob, token.rank)]
        }

    def _envelope(self, kind: str, choices: list[dict[str, Any]], usage: Mapping[str, Any] | None) -> dict[str, Any]:
        envelope = {
            "id": self.response_id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "choices": choices,
            "usage": usage,
        }
        if self.service_tier is not None:
            envelope["service_tier"] = self.service_tier
        return envelope


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


def running_usage(choices: Sequence[Choice], num_choices_per_prompt: int) -> dict[str, Any]:
    """Token counts up to now, for streams that want them with every event."""
    num_prompt_tokens = sum(len(choice.prompt_ids) for choice in choices[::num_choices_per_prompt])
    num_completion_tokens = sum(choice.num_tokens for choice in choices)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
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


def finish_reason(reason: FinishReason | None) -> str | None:
    """OpenAI knows "stop" and "length" of ours; the others never end a delivered answer."""
    return None if reason is None else reason.value
