"""How many lost requests may be sent again: a share of all requests, so that retries cannot feed an overload. Pure.

As in Finagle: every request earns a part of a retry, a steady trickle keeps a quiet service able to retry at all.

| balance                     | a request is lost | answer            |
|-----------------------------|-------------------|-------------------|
| at least one retry          | retried           | balance - 1       |
| less                        | not retried       | the client's turn |
"""

from __future__ import annotations

EARNED_PER_REQUEST = 0.25
EARNED_PER_S = 10.0
CAPACITY = 200.0  # a replica that dies with a full batch and a queue is no overload


class RetryBudget:
    def __init__(self, now_s: float) -> None:
        self._balance = CAPACITY
        self._updated_s = now_s

    def earn(self, now_s: float) -> None:
        """A request came."""
        self._balance = min(CAPACITY, self._trickled(now_s) + EARNED_PER_REQUEST)
        self._updated_s = now_s

    def spend(self, now_s: float) -> bool:
        """Whether a lost request may be sent again."""
        self._balance = self._trickled(now_s)
        self._updated_s = now_s
        if self._balance < 1:
            return False
        self._balance -= 1
        return True

    def _trickled(self, now_s: float) -> float:
        return min(CAPACITY, self._balance + EARNED_PER_S * max(0.0, now_s - self._updated_s))
