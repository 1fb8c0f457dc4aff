"""Clients that take nothing of their stream, alive or gone without a word: found out, so that they pin no place."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import Message, Send


class GuardedSend:
    """A response's ``send`` that says since when it is waiting for the client."""

    def __init__(self, send: Send, task: asyncio.Task[object]) -> None:
        self.task = task
        self.waits_since_s = math.inf
        self.stalled = False
        self._send = send

    async def __call__(self, message: Message) -> None:
        self.waits_since_s = time.monotonic()
        await self._send(message)
        self.waits_since_s = math.inf


class StallWatch:
    """Cancels responses whose client has taken nothing for ``timeout_s``; one look at all of them now and then."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._open: set[GuardedSend] = set()
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def guard(self, send: Send) -> Iterator[GuardedSend]:
        """For the task that runs the response. A cancellation from here sets ``stalled`` first."""
        task = asyncio.current_task()
        assert task is not None
        guarded = GuardedSend(send, task)
        self._open.add(guarded)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run(), name="stall-watch")
        try:
            yield guarded
        finally:
            self._open.discard(guarded)

    async def _run(self) -> None:
        while self._open:
            await asyncio.sleep(self._timeout_s / 4)
            oldest_s = time.monotonic() - self._timeout_s
            for guarded in [each for each in self._open if each.waits_since_s < oldest_s and not each.stalled]:
                guarded.stalled = True
                guarded.task.cancel()
