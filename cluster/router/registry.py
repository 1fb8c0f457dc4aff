"""What a router knows of the replicas' loads: a cache of Redis, refreshed in the background, plus its own picks.

Nothing here is awaited on a request's path. When Redis is away the cache goes stale within STALE_S and is then empty.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence

from redis.exceptions import RedisError

from cluster.router.loads import connect, decode, load_key
from cluster.router.policy import ReplicaLoad

REFRESH_PERIOD_S = 0.05
STALE_S = 0.5
OPEN_AFTER_FAILURES = 3  # then the breaker opens: fewer tries while Redis is away
MAX_BACKOFF_S = 1.0
PICK_VISIBLE_AFTER = 2  # publications: the first may have been taken before the request arrived

logger = logging.getLogger(__name__)


class LoadRegistry:
    """Loads of one application's replicas. All methods belong to one event loop."""

    def __init__(self, redis_url: str, app_name: str) -> None:
        self._client = connect(redis_url)
        self._app_name = app_name
        self._replica_ids: tuple[str, ...] = ()
        self._loads: dict[str, ReplicaLoad] = {}
        self._refreshed_s = float("-inf")
        self._picks: dict[str, list[int]] = {}  # replica_id |-> sequence of its load when each pick was made
        self._num_failures = 0
        self._task: asyncio.Task[None] | None = None

    def watch(self, replica_ids: Sequence[str]) -> None:
        """Name the replicas to know of; starts the refresh on first use."""
        self._replica_ids = tuple(replica_ids)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run(), name="load-registry")

    def loads(self) -> Mapping[str, ReplicaLoad]:
        """Loads within their lease, as of the last refresh; empty when that is too long ago."""
        return self._loads if time.monotonic() - self._refreshed_s <= STALE_S else {}

    def num_picked(self) -> Mapping[str, int]:
        """Own picks that the published loads cannot show yet."""
        return {replica_id: len(picks) for replica_id, picks in self._picks.items()}

    def count_pick(self, replica_id: str) -> None:
        """Count a request sent just now; without it, simultaneous requests would all go to one replica."""
        load = self._loads.get(replica_id)
        if load is not None:
            self._picks.setdefault(replica_id, []).append(load.sequence)

    async def close(self) -> None:
        """Stop refreshing."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._client.aclose()

    async def refresh(self) -> None:
        """Read all watched loads in one round trip. Raises RedisError or OSError."""
        replica_ids = self._replica_ids
        if not replica_ids:
            return
        values = await self._client.mget([load_key(self._app_name, replica_id) for replica_id in replica_ids])
        self._loads = {
            replica_id: decode(value) for replica_id, value in zip(replica_ids, values, strict=True) if value
        }
        self._refreshed_s = time.monotonic()
        self._forget_visible_picks()

    def _forget_visible_picks(self) -> None:
        remaining = {}
        for replica_id, picks in self._picks.items():
            load = self._loads.get(replica_id)
            if load is None:
                continue
            # A sequence that fell belongs to a new life of the replica, which holds none of the old picks.
            unseen = [made for made in picks if made <= load.sequence < made + PICK_VISIBLE_AFTER]
            if unseen:
                remaining[replica_id] = unseen
        self._picks = remaining

    async def _run(self) -> None:
        while True:
            try:
                await self.refresh()
                self._close_breaker()
            except (RedisError, OSError, ValueError, TypeError) as error:
                self._count_failure(error)
            await asyncio.sleep(self._pause_s())

    def _pause_s(self) -> float:
        num_doublings = max(0, self._num_failures - OPEN_AFTER_FAILURES + 1)
        return min(REFRESH_PERIOD_S * 2.0**num_doublings, MAX_BACKOFF_S)

    def _close_breaker(self) -> None:
        if self._num_failures >= OPEN_AFTER_FAILURES:
            logger.info("redis is back; requests are routed by load again")
        self._num_failures = 0

    def _count_failure(self, error: Exception) -> None:
        self._num_failures = min(self._num_failures + 1, OPEN_AFTER_FAILURES + 10)
        if self._num_failures == OPEN_AFTER_FAILURES:
            logger.warning("loads cannot be read from redis (%s); requests are routed by Serve's own choice", error)
