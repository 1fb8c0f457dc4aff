"""What became of each of the newest requests of a replica, for `brownoutserve explain`. Bounded; pure.

It stays in the replica's memory: a record costs a microsecond and no I/O, and is asked for rarely.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

CAPACITY = 4096


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request that ended. Times to it are as its client saw them; None: it did not get that far."""

    request_id: str
    service_class: str
    finish_reason: str
    ended_at_s: float  # Unix time by the replica's own clock: for people, nothing is computed from it
    duration_s: float
    queue_wait_s: float | None
    ttft_s: float | None
    tpot_s: float | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    routed_pairs: int
    dimmed_pairs: int
    level_mean: float
    level_peak: int
    first_setting_version: int  # in force at its first step; 0: none had come yet
    last_setting_version: int


class RequestLog:
    """The newest ``capacity`` records. Thread-safe: the engine's thread appends, others look things up."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._records: deque[RequestRecord] = deque(maxlen=capacity)
        self._lock = threading.Lock()

    def append(self, record: RequestRecord) -> None:
        with self._lock:
            self._records.append(record)

    def find(self, request_id: str) -> list[RequestRecord]:
        """Those of the API request ``request_id``, oldest first: each of its choices and attempts has a suffix."""
        return [r for r in self._copy() if r.request_id == request_id or r.request_id.startswith(f"{request_id}-")]

    def between(self, since_s: float, until_s: float, limit: int) -> list[RequestRecord]:
        """At most ``limit`` that ended in [since_s, until_s), newest first."""
        return [r for r in reversed(self._copy()) if since_s <= r.ended_at_s < until_s][: max(limit, 0)]

    def _copy(self) -> list[RequestRecord]:
        with self._lock:
            return list(self._records)
