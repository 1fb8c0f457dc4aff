"""How many requests come per second, from a counter that is read now and then. Pure."""

from __future__ import annotations

import math


class ArrivalRate:
    """An exponential average with the time constant ``memory_s``."""

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._rate_per_s = 0.0
        self._total = 0
        self._updated_s: float | None = None

    def update(self, total: int, now_s: float) -> float:
        """Requests per second; ``total`` is the counter now. Requests before the first call do not count."""
        if self._updated_s is not None and now_s > self._updated_s:
            elapsed_s = now_s - self._updated_s
            kept = math.exp(-elapsed_s / self._memory_s)
            self._rate_per_s = kept * self._rate_per_s + (1 - kept) * (total - self._total) / elapsed_s
        self._total, self._updated_s = total, now_s
        return self._rate_per_s
