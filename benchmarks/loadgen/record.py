"""What is known of one request after it ended. Times are seconds since the run's start."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from benchmarks.workloads.workload import Arrival
from engine.types import BrownoutUsage


class Outcome(StrEnum):
    """Every way in which a request ends, as its client saw it."""

    COMPLETED = "completed"
    REJECTED = "rejected"  # 429 or 503 before the first token: busy, try again
    HTTP_ERROR = "http_error"  # any other status than 200
    STREAM_ERROR = "stream_error"  # an explicit error event in the stream
    DISCONNECTED = "disconnected"  # refused, reset, or ended without the final event
    TIMEOUT = "timeout"
    MALFORMED = "malformed"  # not the protocol: unreadable JSON, no usage, no token


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """Latencies count from ``scheduled_s``: a client that is late in sending does not hide the wait it caused."""

    scheduled_s: float
    sent_s: float
    outcome: Outcome
    first_token_s: float | None = None
    last_token_s: float | None = None
    num_prompt_tokens: int = 0
    num_tokens: int = 0  # completion tokens, by the server's own count
    brownout: BrownoutUsage | None = None
    error: str | None = None

    @property
    def completed(self) -> bool:
        return self.outcome is Outcome.COMPLETED

    @property
    def ttft_s(self) -> float:
        """Time to first token, infinite if the request failed."""
        if not self.completed or self.first_token_s is None:
            return float("inf")
        return self.first_token_s - self.scheduled_s

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first; infinite if the request failed, 0 if there was one token only."""
        if not self.completed or self.first_token_s is None or self.last_token_s is None:
            return float("inf")
        if self.num_tokens <= 1:
            return 0.0
        return (self.last_token_s - self.first_token_s) / (self.num_tokens - 1)


Clock = Callable[[], float]  # seconds since the run's start
Send = Callable[[Arrival, Clock], Coroutine[Any, Any, RequestRecord]]  # never raises for what a server does
