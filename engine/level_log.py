"""The newest level changes of a replica's own governor, and what it saw then: for `brownoutserve explain`. Bounded."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

CAPACITY = 4096


@dataclass(frozen=True, slots=True)
class LevelChange:
    """The step launched at ``at_s`` runs at another level than the step before it. The level is that of the deeper
    phase; what is said of the queue was so when the level was chosen."""

    at_s: float  # Unix time by the replica's own clock
    level_before: int
    level: int
    since_launch_s: float  # of the step before
    num_running: int
    num_waiting: int
    oldest_wait_s: float  # of those without a first token, in the batch or in the queue; 0: there are none
    setting_version: int  # in force


class LevelLog:
    """The newest ``capacity`` changes. Thread-safe: the engine's thread appends, others look things up."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._changes: deque[LevelChange] = deque(maxlen=capacity)
        self._lock = threading.Lock()

    def append(self, change: LevelChange) -> None:
        with self._lock:
            self._changes.append(change)

    def between(self, since_s: float, until_s: float) -> list[LevelChange]:
        """Those in [since_s, until_s), oldest first."""
        with self._lock:
            changes = list(self._changes)
        return [change for change in changes if since_s <= change.at_s < until_s]
