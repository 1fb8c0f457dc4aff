"""What a router knows of the replicas' loads: a cache of Redis, and the picks of all ingress processes since.

A pick is counted in Redis until the replica's published load shows it. Counting and reading are one round trip, made in
the background: at once when there are picks to tell, else every EXCHANGE_PERIOD_S. So a process that picks learns what
the others picked about one round trip ago, and nothing is awaited on a request's path. A pick not yet told counts once
for each ingress process: the others see the same loads, so each is probably making the same pick at this moment.
When Redis is away the cache goes stale within STALE_S and is then empty.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress

from cluster.router.loads import connect, decode, end, load_key, picks_key
from cluster.router.policy import Picked, ReplicaLoad

EXCHANGE_PERIOD_S = 0.05
MIN_GAP_S = 0.002  # between two exchanges, however many picks there are
STALE_S = 0.5
OPEN_AFTER_FAILURES = 3  # then the breaker opens: fewer tries while Redis is away
MAX_BACKOFF_S = 1.0
PICK_VISIBLE_AFTER = 2  # publications: the first may have been taken before the request arrived
REQUESTS, PROMPT_TOKENS = "requests", "prompt_tokens"  # what is counted of picks
PICKS_TTL_S = 2.0  # of all counts, renewed with each; a replica publishes twice in a tenth of that

logger = logging.getLogger(__name__)


class LoadRegistry:
    """Loads of one group of replicas, for one of ``num_routers``. All methods belong to one event loop."""

    def __init__(self, redis_url: str, group: str, num_routers: int = 1) -> None:
        self._client = connect(redis_url)
        self._group = group
        self._num_routers = num_routers
        self._picks_key = picks_key(group)
        self._replica_ids: tuple[str, ...] = ()
        self._loads: dict[str, ReplicaLoad] = {}
        self._exchanged_s = float("-inf")
        # (replica_id, sequence of its load when the pick was made, what is counted) |-> count
        self._untold: Counter[tuple[str, int, str]] = Counter()
        self._told: Counter[tuple[str, int, str]] = Counter()  # by every process, as of the last exchange
        self._has_untold = asyncio.Event()
        self._has_tried = asyncio.Event()  # whatever came of it
        self._num_failures = 0
        self._task: asyncio.Task[None] | None = None

    def watch(self, replica_ids: Sequence[str]) -> None:
        """Name the replicas to know of; starts the exchange on first use."""
        self._replica_ids = tuple(replica_ids)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run(), name="load-registry")

    async def first_exchange(self, timeout_s: float) -> None:
        """Returns once the first exchange has ended, well or not; later calls return at once."""
        if not self._has_tried.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._has_tried.wait()

    def loads(self) -> Mapping[str, ReplicaLoad]:
        """Loads within their lease, as of the last exchange; empty when that is too long ago."""
        return self._loads if time.monotonic() - self._exchanged_s <= STALE_S else {}

    def picked(self) -> Mapping[str, Picked]:
        """Picks of all processes that the published loads cannot show yet."""
        counts: Counter[tuple[str, str]] = Counter()
        for picks, weight in ((self._told, 1), (self._untold, self._num_routers)):
            for (replica_id, sequence, what), count in picks.items():
                if self._is_unseen(replica_id, sequence):
                    counts[replica_id, what] += weight * count
        names = {replica_id for replica_id, _ in counts}
        return {name: Picked(counts[name, REQUESTS], counts[name, PROMPT_TOKENS]) for name in names}

    def count_pick(self, replica_id: str, prompt_tokens: int = 0) -> None:
        """Count a request sent just now; without it, simultaneous requests would all go to one replica.

        ``prompt_tokens``: those that the replica must compute.
        """
        load = self._loads.get(replica_id)
        if load is not None:
            self._untold[replica_id, load.sequence, REQUESTS] += 1
            self._untold[replica_id, load.sequence, PROMPT_TOKENS] += prompt_tokens
            self._has_untold.set()

    async def close(self) -> None:
        """Stop exchanging."""
        if self._task is not None:
            await end(self._task)
        await self._client.aclose()

    async def exchange(self) -> None:
        """Tell the own picks, read all picks and all watched loads. Raises what the client raises, or ValueError."""
        replica_ids = self._replica_ids
        if not replica_ids:
            return
        telling = Counter(self._untold)
        async with self._client.pipeline(transaction=True) as pipeline:
            for pick, count in telling.items():
                pipeline.hincrby(self._picks_key, _field(pick), count)
            if seen := [_field(pick) for pick in self._told if not self._is_unseen(*pick[:2])]:
                pipeline.hdel(self._picks_key, *seen)
            pipeline.pexpire(self._picks_key, int(PICKS_TTL_S * 1000))
            pipeline.hgetall(self._picks_key)
            pipeline.mget([load_key(self._group, replica_id) for replica_id in replica_ids])
            *_, picks, values = await pipeline.execute()
        self._loads = {
            replica_id: decode(value) for replica_id, value in zip(replica_ids, values, strict=True) if value
        }
        self._told = Counter({_parse_pick(field): int(count) for field, count in picks.items()})
        self._untold -= telling
        self._exchanged_s = time.monotonic()

    def _is_unseen(self, replica_id: str, sequence: int) -> bool:
        # A sequence that fell belongs to a new life of the replica, which holds none of the old picks.
        load = self._loads.get(replica_id)
        return load is not None and sequence <= load.sequence < sequence + PICK_VISIBLE_AFTER

    async def _run(self) -> None:
        while True:
            self._has_untold.clear()
            try:
                await self.exchange()
                self._close_breaker()
            except Exception as error:  # whatever a lost connection or a stranger's key makes of it: routing goes on
                self._untold.clear()  # old news by the time Redis is back
                self._count_failure(error)
            self._has_tried.set()
            await self._pause()

    async def _pause(self) -> None:
        if self._num_failures >= OPEN_AFTER_FAILURES:
            num_doublings = self._num_failures - OPEN_AFTER_FAILURES + 1
            await asyncio.sleep(min(EXCHANGE_PERIOD_S * 2.0**num_doublings, MAX_BACKOFF_S))
            return
        await asyncio.sleep(MIN_GAP_S)
        try:
            async with asyncio.timeout(EXCHANGE_PERIOD_S):
                await self._has_untold.wait()
        except TimeoutError:
            pass

    def _close_breaker(self) -> None:
        if self._num_failures >= OPEN_AFTER_FAILURES:
            logger.info("redis is back; requests are routed by load again")
        self._num_failures = 0

    def _count_failure(self, error: Exception) -> None:
        self._num_failures = min(self._num_failures + 1, OPEN_AFTER_FAILURES + 10)
        if self._num_failures == OPEN_AFTER_FAILURES:
            logger.warning("loads cannot be read from redis (%s); requests are routed by the own count", error)


def _field(pick: tuple[str, int, str]) -> str:
    """Of the hash of picks."""
    return "|".join(map(str, pick))


def _parse_pick(field: bytes) -> tuple[str, int, str]:
    """Raises ValueError when it is no field of ours."""
    replica_id, sequence, what = field.decode().rsplit("|", 2)
    return replica_id, int(sequence), what
