"""The virtual clock: a heap of things to do, in order of time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count


class EventLoop:
    """Runs actions in order of time; of those due together, the first scheduled first."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._ids = count()

    def at(self, when_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (when_s, next(self._ids), action))

    def every(self, period_s: float, action: Callable[[], None], first_s: float = 0.0) -> None:
        """For as long as the loop runs."""

        def repeat() -> None:
            action()
            self.at(self.now_s + period_s, repeat)

        self.at(first_s, repeat)

    def run(self, until: Callable[[], bool]) -> None:
        """Until ``until()`` is true after an action, or nothing is left to do."""
        while self._heap and not until():
            self.now_s, _, action = heapq.heappop(self._heap)
            action()
