"""chat.completion and chat.completion.chunk objects. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.ingress.openai.responses import MIN_LOGPROB, Choice, Endpoint, finish_reason
from cluster.ingress.openai.tool_calls import Found
from engine.types import FinishReason, RequestOutput, TokenLogprob


class ChatEndpoint(Endpoint):
    __slots__ = ()

    def response(self, choices: Sequence[Choice], usage: Mapping[str, Any]) -> dict[str, Any]:
        parts = [
            {
                "index": choice.index,
                "message": _message(choice),
                "logprobs": self._logprobs(choice.logprobs),
                "finish_reason": _finish_reason(choice, choice.finish_reason),
                "stop_reason": choice.stop_reason,
                **self._token_ids(choice.token_ids),
            }
            for choice in choices
        ]
        of_prompt = {**self._prompt_ids(choices[0]), **self._prompt_logprobs(choices[0])}
        return {**self._envelope("chat.completion", parts, usage), **of_prompt}

    def chunk(self, choice: Choice, output: RequestOutput, first: bool) -> dict[str, Any] | None:
        found = Found(output.text)
        if choice.tool_parser is not None:
            found = choice.tool_parser.feed(output.text, output.finished)
        text, deltas = found.text, found.deltas
        if not (first or text or deltas or output.logprobs or output.finished or self.shows_ids):
            return None
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if text or first:
            delta["content"] = text
        if deltas:
            delta["tool_calls"] = list(deltas)
        part = {
            "index": choice.index,
            "delta": delta,
            "logprobs": self._logprobs(output.logprobs),
            "finish_reason": _finish_reason(choice, output.finish_reason),
            **({"stop_reason": output.stop_reason} if output.finished else {}),
            **self._token_ids(output.token_ids),
        }
        return {**self._envelope("chat.completion.chunk", [part], None), **(self._prompt_ids(choice) if first else {})}

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
            "token": self._token(token_id),
            "logprob": max(logprob, MIN_LOGPROB),
            "bytes": list(self.tokens.token_bytes(token_id)),
        }


def _message(choice: Choice) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.tool_parser is None:
        return message
    found = choice.tool_parser.feed(choice.text, last=True)
    calls = [
        {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in choice.tool_parser.calls
    ]
    if not calls:
        return message
    return {**message, "content": found.text or None, "tool_calls": calls}


def _finish_reason(choice: Choice, reason: FinishReason | None) -> str | None:
    """An answer that ends with calls ends for them, also when the client had asked for a certain one."""
    if reason is FinishReason.STOP and choice.tool_parser is not None and choice.tool_parser.calls:
        return "tool_calls"
    return finish_reason(reason)
