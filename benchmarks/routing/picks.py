"""What one pick costs, with Redis well, slow, down, flushed and restarted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from redis import Redis

from benchmarks.report import nearest_rank
from benchmarks.routing.herding import APP, REPLICAS, REQUEST, Replicas
from cluster.local.redis_server import RedisServer
from cluster.router.registry import LoadRegistry
from cluster.router.router import Router

NUM_PICKS = 2000
PICKS_PER_S = 200.0
SLOW_S = 0.2


class SlowRedis:
    """A TCP relay to Redis that holds every byte back for ``delay_s``."""

    def __init__(self, redis_url: str) -> None:
        self._target = urlsplit(redis_url)
        self.delay_s = 0.0
        self.url = ""

    async def __aenter__(self) -> SlowRedis:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"redis://:{self._target.password}@127.0.0.1:{port}/0"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            other_reader, other_writer = await asyncio.open_connection(self._target.hostname, self._target.port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._copy(reader, other_writer), self._copy(other_reader, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                await asyncio.sleep(self.delay_s / 2)
                writer.write(data)
                await writer.drain()
        writer.close()


async def measure_picks(redis: RedisServer) -> dict[str, dict[str, float]]:
    """Milliseconds of one pick in each state of Redis, from the request's side."""
    figures = {}
    async with SlowRedis(redis.url) as relay, Replicas(redis.url):
        router = Router(registry := LoadRegistry(relay.url, APP))
        held = dict.fromkeys(REPLICAS, 0)
        router.pick(REQUEST, held)
        await asyncio.sleep(0.5)

        async def measure(disturb: Callable[[], Any] | None = None) -> dict[str, float]:
            times_ms = []
            for number in range(NUM_PICKS // 4):
                if number == NUM_PICKS // 40 and disturb:
                    disturbing = asyncio.create_task(asyncio.to_thread(disturb))
                started_s = time.perf_counter()
                router.pick(replace(REQUEST, prompt_ids=tuple(range(number, number + 256))), held)
                times_ms.append(1e3 * (time.perf_counter() - started_s))
                await asyncio.sleep(1 / PICKS_PER_S)
            if disturb:
                await disturbing
            return {"p50": nearest_rank(times_ms, 50), "p99": nearest_rank(times_ms, 99), "max": max(times_ms)}

        figures["well"] = await measure()
        figures["slow"] = await measure(lambda: setattr(relay, "delay_s", SLOW_S))
        relay.delay_s = 0.0
        with Redis.from_url(redis.url) as client:
            figures["flushed"] = await measure(client.flushall)
        figures["down"] = await measure(redis.stop)
        figures["restarted"] = await measure(redis.start)
        await registry.close()
    return figures
