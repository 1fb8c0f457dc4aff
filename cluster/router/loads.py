"""Replica loads in Redis: one leased key per replica, and the publisher that each replica runs.

All keys of a model's routers share a hash tag, so that a Redis Cluster keeps them together.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

import msgspec
import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from cluster.names import key_prefix
from cluster.router.policy import ReplicaLoad
from engine.types import EngineDeadError

PUBLISH_PERIOD_S = 0.1
LEASE_S = 1.0  # a replica that has not published for so long is unknown
TIMEOUT_S = 0.2  # of one Redis call; never on a request's path

logger = logging.getLogger(__name__)

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(ReplicaLoad).decode  # raises ValueError when the bytes are no load


def router_group(app_name: str, deployment: str) -> str:
    """The replicas among which a router chooses: those of one model. Names their keys."""
    return f"{key_prefix(app_name)}:{deployment}"


def load_key(group: str, replica_id: str) -> str:
    return f"{_tag(group)}:load:{replica_id}"


def picks_key(group: str) -> str:
    """A hash: see registry.py."""
    return f"{_tag(group)}:picks"


def _tag(group: str) -> str:
    return f"{{{group}:router}}"


def connect(redis_url: str) -> aioredis.Redis:
    """A client that fails at once instead of retrying: its callers try again in their next period anyway."""
    return aioredis.Redis.from_url(
        redis_url,
        socket_timeout=TIMEOUT_S,
        socket_connect_timeout=TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )


async def end(task: asyncio.Task[None]) -> None:
    """Cancel until it has ended: a client may swallow a cancellation that meets its own timeout."""
    while not task.done():
        task.cancel()
        await asyncio.wait((task,), timeout=TIMEOUT_S)


class LoadPublisher:
    """Publishes one replica's load until it is stopped; a Redis that is away is tried again each period.

    ``take_load`` is given the publication's sequence number. It raises EngineDeadError while there is nothing to route
    to; the load is withdrawn at once, and published again should the engine go on. Any other error of it is a fault of
    ours: it is logged, the load withdrawn, and the next period tries again, because a replica that serves well must not
    be without requests until somebody restarts it.
    """

    def __init__(self, redis_url: str, group: str, replica_id: str, take_load: Callable[[int], ReplicaLoad]) -> None:
        self._client = connect(redis_url)
        self._key = load_key(group, replica_id)
        self._take_load = take_load
        self._sequence = 0
        self._reachable = True
        self._fault: Exception | None = None  # why the last load could not be told
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="load-publisher")

    async def stop(self) -> None:
        """Withdraw the load, so that routers stop choosing this replica at once."""
        if self._task is not None:
            await end(self._task)
        await self._withdraw()
        await self._client.aclose()

    async def _withdraw(self) -> None:
        with suppress(Exception):  # its lease ends soon anyway
            await self._client.delete(self._key)

    async def _run(self) -> None:
        is_published = False
        while True:
            self._sequence += 1
            try:
                value = encode(self._take_load(self._sequence))
            except Exception as error:
                self._note_fault(None if isinstance(error, EngineDeadError) else error)
                if is_published:
                    await self._withdraw()
                is_published = False
            else:
                self._note_fault(None)
                is_published = True
                await self._publish(value)
            await asyncio.sleep(PUBLISH_PERIOD_S)

    async def _publish(self, value: bytes) -> None:
        try:
            await self._client.set(self._key, value, px=int(LEASE_S * 1000))
            self._note(reachable=True)
        except Exception as error:  # whatever a lost connection makes the client raise
            self._note(reachable=False, error=error)

    def _note_fault(self, error: Exception | None) -> None:
        """Log a fault once while it lasts."""
        if repr(error) != repr(self._fault) and error is not None:
            logger.error("this replica's load cannot be told, so no requests are routed here", exc_info=error)
        self._fault = error

    def _note(self, *, reachable: bool, error: Exception | None = None) -> None:
        """Log changes only."""
        if reachable != self._reachable:
            self._reachable = reachable
            if reachable:
                logger.info("redis is back; this replica's load is published again")
            else:
                logger.warning("redis does not answer (%s); routers cannot see this replica's load", error)
