"""text_completion objects, whole and streamed. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.ingress.openai.responses import MIN_LOGPROB, Choice, Endpoint, finish_reason
from engine.types import RequestOutput, TokenLogprob


class CompletionEndpoint(Endpoint):
    __slots__ = ()

    def response(self, choices: Sequence[Choice], usage: Mapping[str, Any]) -> dict[str, Any]:
        parts = [
            {
                "index": choice.index,
                "text": self._prefix(choice) + choice.text,
                "logprobs": self._logprobs(choice, choice.prompt_logprobs, choice.logprobs),
                "finish_reason": finish_reason(choice.finish_reason),
                "stop_reason": choice.stop_reason,
                **self._token_ids(choice.token_ids),
                **self._prompt_ids(choice),
                **self._prompt_logprobs(choice),
            }
            for choice in choices
        ]
        return self._envelope("text_completion", parts, usage)

    def chunk(self, choice: Choice, output: RequestOutput, first: bool) -> dict[str, Any] | None:
        if not (first or output.text or output.logprobs or output.finished or self.shows_ids):
            return None
        part = {
            "index": choice.index,
            "text": (self._prefix(choice) if first else "") + output.text,
            "logprobs": self._logprobs(choice, output.prompt_logprobs, output.logprobs),
            "finish_reason": finish_reason(output.finish_reason),
            **({"stop_reason": output.stop_reason} if output.finished else {}),
            **self._token_ids(output.token_ids),
            **(self._prompt_ids(choice) if first else {}),
        }
        return self._envelope("text_completion", [part], None)

    def usage_chunk(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        return self._envelope("text_completion", [], usage)

    def _prefix(self, choice: Choice) -> str:
        return self.prefix_texts[choice.index] if self.prefix_texts else ""

    def _logprobs(
        self,
        choice: Choice,
        of_prompt: Sequence[TokenLogprob | None] | None,
        of_answer: Sequence[TokenLogprob] | None,
    ) -> dict[str, Any] | None:
        """OpenAI's four parallel lists; an echoed prompt's first token has a place but no probability."""
        of_prompt = of_prompt if self.prefix_texts else None  # they may have been asked for apart from an echo
        if of_prompt is None and of_answer is None:
            return None
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in [*(of_prompt or ()), *(of_answer or ())]:
            token_id = token.token_id if token else choice.prompt_ids[0]
            lists["tokens"].append(self._token(token_id))
            lists["token_logprobs"].append(max(token.logprob, MIN_LOGPROB) if token else None)
            lists["top_logprobs"].append(self._top(token) if token else None)
            lists["text_offset"].append(choice.num_logprob_characters)
            choice.num_logprob_characters += len(self.tokens.token_text(token_id))
        return lists

    def _top(self, token: TokenLogprob) -> dict[str, float]:
        """Text |-> logprob; OpenAI always lists the chosen one. Of tokens with one text the likeliest counts."""
        top: dict[str, float] = {}
        for token_id, logprob in ((token.token_id, token.logprob), *token.top):
            text = self._token(token_id)
            top[text] = max(logprob, top.get(text, MIN_LOGPROB))
        return top
