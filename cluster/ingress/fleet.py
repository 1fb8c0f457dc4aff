"""The replicas of one model as an ingress process sees them: which there are, and one channel to each."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from cluster.reports import ReplicaReport
from cluster.transport.channel import ReplicaChannel, ReplicaLostError
from engine.types import ModelInfo

REFRESH_PERIOD_S = 1.0
SEARCH_PERIOD_S = 0.1  # while no replica is known, or one was lost just now
SEARCH_S = 5.0
FORGET_S = 5.0  # a replica that Serve has not named for so long is not one any more

logger = logging.getLogger(__name__)


class Fleet:
    """Keeps a channel to each replica that ``ask`` reports. All methods belong to one event loop."""

    def __init__(
        self,
        ask: Callable[[], Awaitable[list[ReplicaReport]]],
        on_known: Callable[[Sequence[str]], None],
        on_gone: Callable[[str], None],
    ) -> None:
        self._ask = ask
        self._on_known = on_known  # told the ids of all that take requests when there are more
        self._on_gone = on_gone  # told the id of a replica that takes no requests any more
        self._channels: dict[str, ReplicaChannel] = {}
        self._leaving: dict[str, ReplicaChannel] = {}  # get nothing new, but still serve what they have
        self._seen_s: dict[str, float] = {}  # replica_id |-> when Serve last named it
        self._search_until_s = 0.0
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.info: ModelInfo | None = None  # what the replicas serve; None until one has been seen

    def start(self) -> None:
        """Begin to look for replicas; later calls do nothing."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="fleet")

    async def stop(self) -> None:
        """Close all channels."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for channel in (*self._channels.values(), *self._leaving.values()):
            await channel.close()

    def channels(self) -> dict[str, ReplicaChannel]:
        """Those that take requests."""
        return self._channels

    async def wait_for_replica(self, timeout_s: float) -> bool:
        """Whether a replica takes requests, waiting for one if need be."""
        self.start()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._channels:
                    self._changed.clear()
                    await self._changed.wait()
        return bool(self._channels)

    def retire(self, channel: ReplicaChannel) -> None:
        """Send nothing new to a replica that is being taken down or fails, until it reports again."""
        if self._channels.get(channel.replica_id) is channel:
            del self._channels[channel.replica_id]
            self._leaving[channel.replica_id] = channel
            self._on_gone(channel.replica_id)
            self._search()

    def _lose(self, channel: ReplicaChannel) -> None:
        for channels in (self._channels, self._leaving):
            if channels.get(channel.replica_id) is channel:
                del channels[channel.replica_id]
                self._on_gone(channel.replica_id)
        self._search()

    def _search(self) -> None:
        self._search_until_s = time.monotonic() + SEARCH_S

    async def _run(self) -> None:
        while True:
            try:
                await self._refresh()
            except Exception:  # this loop must outlive whatever Serve does
                logger.exception("looking for replicas")
            searching = not self._channels or time.monotonic() < self._search_until_s
            await asyncio.sleep(SEARCH_PERIOD_S if searching else REFRESH_PERIOD_S)

    async def _refresh(self) -> None:
        reports = await self._ask()
        now_s = time.monotonic()
        for report in reports:
            self.info = self.info or report.info
            self._seen_s[report.replica_id] = now_s
            if returned := self._leaving.pop(report.replica_id, None):
                self._add(returned)
        new = [r for r in reports if r.replica_id not in self._channels]
        await asyncio.gather(*(self._open(report) for report in new))
        for replica_id, seen_s in list(self._seen_s.items()):
            if now_s - seen_s > FORGET_S:
                del self._seen_s[replica_id]
                if replica_id in self._channels:
                    self.retire(self._channels[replica_id])
        for replica_id, channel in list(self._leaving.items()):
            if not channel.num_open and replica_id not in self._seen_s:
                self._leaving.pop(replica_id, None)  # it may have been lost while another one was being closed
                await channel.close()

    async def _open(self, report: ReplicaReport) -> None:
        try:
            channel = await ReplicaChannel.open(report.replica_id, report.address, report.token, self._lose)
        except ReplicaLostError as error:
            logger.warning("%s", error)
            return
        self._add(channel)

    def _add(self, channel: ReplicaChannel) -> None:
        self._channels[channel.replica_id] = channel
        self._on_known(tuple(self._channels))
        self._changed.set()
