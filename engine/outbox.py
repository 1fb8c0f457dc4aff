"""Coalesces what a stream gains over several steps, so that fast steps do not cost one message each. Pure.

The first token and the last output leave at once; in between a stream sends at most every ``interval_s``.
"""

from __future__ import annotations

from dataclasses import replace

from engine.types import RequestOutput


class Outbox:
    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._pending: dict[str, RequestOutput] = {}
        self._sent_s: dict[str, float] = {}  # request_id |-> when it last sent something

    def collect(self, outputs: list[RequestOutput], now_s: float) -> list[RequestOutput]:
        """Take in a step's outputs; returns what is to be sent now."""
        for output in outputs:
            earlier = self._pending.get(output.request_id)
            self._pending[output.request_id] = merge(earlier, output) if earlier else output
        due = [output for output in self._pending.values() if self._is_due(output, now_s)]
        for output in due:
            del self._pending[output.request_id]
            if output.finished:
                self._sent_s.pop(output.request_id, None)
            else:
                self._sent_s[output.request_id] = now_s
        return due

    def _is_due(self, output: RequestOutput, now_s: float) -> bool:
        sent_s = self._sent_s.get(output.request_id)
        return sent_s is None or output.finished or now_s - sent_s >= self._interval_s


def merge(earlier: RequestOutput, later: RequestOutput) -> RequestOutput:
    """One output that says what both say, in order."""
    return replace(
        later,
        token_ids=earlier.token_ids + later.token_ids,
        text=earlier.text + later.text,
        logprobs=(earlier.logprobs or ()) + (later.logprobs or ()) or None,
        prompt_logprobs=earlier.prompt_logprobs,
    )
