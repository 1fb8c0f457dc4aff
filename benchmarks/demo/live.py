"""Watching a run while it goes on: request counts, recent latency, brownout level."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from benchmarks.loadgen.record import Clock, RequestRecord, Send
from benchmarks.report import nearest_rank
from benchmarks.workloads.workload import Arrival

RECENT_S = 2.0  # the live latency is that of requests which ended so recently


class RequestMonitor:
    """Counts requests on their way through ``watch(send)``."""

    def __init__(self) -> None:
        self.num_sent = 0
        self.num_ended = 0
        self.num_failed = 0
        self._recent: deque[tuple[float, float]] = deque()  # (end, ttft) in seconds

    def watch(self, send: Send) -> Send:
        async def watched(arrival: Arrival, clock: Clock) -> RequestRecord:
            self.num_sent += 1
            record = await send(arrival, clock)
            self.num_ended += 1
            self.num_failed += not record.completed
            self._recent.append((clock(), record.ttft_s))
            return record

        return watched

    def ttft_p90_s(self, now_s: float) -> float | None:
        """Over the requests that ended lately; None when there are none."""
        while self._recent and self._recent[0][0] < now_s - RECENT_S:
            self._recent.popleft()
        return nearest_rank((ttft_s for _, ttft_s in self._recent), 90) if self._recent else None

    def progress(self, now_s: float, num_requests: int) -> str:
        """One line for people, of ``num_requests`` in all."""
        ttft_s = self.ttft_p90_s(now_s)
        return (
            f"{self.num_ended}/{num_requests} answered, {self.num_sent - self.num_ended} open, "
            f"{self.num_failed} failed  TTFT p90 {'-' if ttft_s is None else f'{ttft_s:.2f} s'}"
        )


@asynccontextmanager
async def every(period_s: float, action: Callable[[float], object]) -> AsyncIterator[None]:
    """Calls ``action(seconds since entry)`` in a worker thread each period, so that a slow one delays no request.

    An action that raises ends the calls and raises on leaving.
    """
    loop = asyncio.get_running_loop()
    start_s = loop.time()

    async def repeat() -> None:
        while True:
            await asyncio.to_thread(action, loop.time() - start_s)
            await asyncio.sleep(period_s)

    task = asyncio.create_task(repeat())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
