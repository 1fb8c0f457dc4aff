"""Coalesces what streams gain over several steps, so that fast steps do not cost one message each. Pure.

A stream's first token and its last output leave at once; all else waits for a common tick, at most ``interval_s``, so
that what leaves together can travel and be handled together.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from engine.types import RequestOutput


class Outbox:
    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._pending: dict[str, list[RequestOutput]] = {}
        self._begun: set[str] = set()  # requests that have sent something and are not finished
        self._ticked_s = float("-inf")

    def collect(self, outputs: list[RequestOutput], now_s: float) -> list[RequestOutput]:
        """Take in a step's outputs; returns what is to be sent now."""
        due = []
        for output in outputs:
            request_id = output.request_id
            if output.finished:
                self._begun.discard(request_id)
                due.append(merge([*self._pending.pop(request_id, ()), output]))
            elif request_id in self._begun:
                self._pending.setdefault(request_id, []).append(output)
            else:
                self._begun.add(request_id)
                due.append(output)
        if now_s - self._ticked_s >= self._interval_s:
            self._ticked_s = now_s
            due += [merge(gained) for gained in self._pending.values()]
            self._pending.clear()
        return due


def merge(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """One output of a request that says what all of them say, in order."""
    last = outputs[-1]
    if len(outputs) == 1:
        return last
    return last._replace(
        token_ids=tuple(chain.from_iterable(output.token_ids for output in outputs)),
        text="".join([output.text for output in outputs]),
        logprobs=tuple(chain.from_iterable(output.logprobs or () for output in outputs)) or None,
        prompt_logprobs=outputs[0].prompt_logprobs,
    )
