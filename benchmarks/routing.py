"""What routing costs a request, and how evenly several ingress processes spread what they cannot see of each other.

Real Redis, real routers, each with its own connection, four replicas that only hold requests and publish loads.

1. The time of one pick, with Redis well, slow (200 ms), down, flushed and restarted.
2. Herding: four routers share Poisson arrivals and bursts. Compared: no exchange of picks, the shipped counted picks,
   and an atomic pick-and-reserve script that every request waits for.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from redis import Redis

from benchmarks.report import nearest_rank
from benchmarks.results import RESULTS, markdown_table, update_result
from cluster.local.redis_server import RedisServer
from cluster.router.loads import LoadPublisher, connect
from cluster.router.policy import Picked, ReplicaLoad
from cluster.router.registry import LoadRegistry
from cluster.router.router import Router
from engine.types import GenerationRequest

APP = "routing"
REPLICAS = ("r0", "r1", "r2", "r3")
NUM_ROUTERS = 4
NUM_PICKS = 2000
PICKS_PER_S = 200.0
SLOW_S = 0.2
HOLD_S = 1.0  # mean time that a replica holds a request
RATE_PER_S = 150.0
RUN_S = 6.0
NUM_BURSTS = 12
BURST = 64
EMPTY = ReplicaLoad(0, 0, 0, max_num_seqs=64, queued_prefill_tokens=0, max_num_batched_tokens=2048, kv_used_frac=0.0)
REQUEST = GenerationRequest("r", tuple(range(256)))


class OwnPicks(LoadRegistry):
    """A router that learns of the others' picks only by the published loads."""

    def picked(self) -> Mapping[str, Picked]:
        num_picked = dict.fromkeys(REPLICAS, 0)
        for (replica_id, sequence), count in self._own.items():
            if self._is_unseen(replica_id, sequence):
                num_picked[replica_id] += count
        return {name: Picked(count) for name, count in num_picked.items()}

    def count_pick(self, replica_id: str, prompt_tokens: int = 0) -> None:
        load = self._loads.get(replica_id)
        if load is not None:
            key = (replica_id, load.sequence)
            self._own[key] = self._own.get(key, 0) + 1

    def __init__(self, redis_url: str, app_name: str) -> None:
        super().__init__(redis_url, app_name)
        self._own: dict[tuple[str, int], int] = {}


# The least loaded of ARGV's replicas by its published load (mirrored as plain numbers) and the reservations since.
RESERVE = """
local best, least = 1, math.huge
for i, name in ipairs(ARGV) do
    local load = tonumber(redis.call('GET', KEYS[1] .. ':held:' .. name) or '0')
    local reserved = tonumber(redis.call('GET', KEYS[1] .. ':reserved:' .. name) or '0')
    if load + reserved < least then best, least = i, load + reserved end
end
redis.call('INCR', KEYS[1] .. ':reserved:' .. ARGV[best])
redis.call('PEXPIRE', KEYS[1] .. ':reserved:' .. ARGV[best], 250)
return ARGV[best]
"""
RESERVE_TAG = "{routing:reserve}"


class Replicas:
    """Hold requests for a while and publish how many; nothing else."""

    def __init__(self, redis_url: str) -> None:
        self.held = dict.fromkeys(REPLICAS, 0)
        self.imbalances: list[int] = []
        self._client = connect(redis_url)
        self._publishers = [
            LoadPublisher(redis_url, APP, name, lambda sequence, name=name: self._load(name, sequence))
            for name in REPLICAS
        ]
        self._tasks: set[asyncio.Task[None]] = set()

    def _load(self, name: str, sequence: int) -> ReplicaLoad:
        self._spawn(self._mirror(name))
        return replace(EMPTY, sequence=sequence, num_running=self.held[name])

    async def _mirror(self, name: str) -> None:
        with suppress(Exception):
            async with self._client.pipeline() as pipeline:
                pipeline.set(f"{RESERVE_TAG}:held:{name}", self.held[name])
                pipeline.delete(f"{RESERVE_TAG}:reserved:{name}")
                await pipeline.execute()

    def take(self, name: str, hold_s: float) -> None:
        self.held[name] += 1
        self.imbalances.append(max(self.held.values()) - min(self.held.values()))
        self._spawn(self._release(name, hold_s))

    async def _release(self, name: str, hold_s: float) -> None:
        await asyncio.sleep(hold_s)
        self.held[name] -= 1

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def __aenter__(self) -> Replicas:
        for publisher in self._publishers:
            publisher.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for publisher in self._publishers:
            await publisher.stop()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()


Pick = Callable[[], Awaitable[str]]


@asynccontextmanager
async def picker(mode: str, redis_url: str) -> AsyncIterator[Pick]:
    """One ingress process's way to pick."""
    if mode == "reserve":
        client = connect(redis_url)
        script = client.register_script(RESERVE)

        async def pick() -> str:
            return (await script(keys=[RESERVE_TAG], args=list(REPLICAS))).decode()

        yield pick
        await client.aclose()
        return
    registry = OwnPicks(redis_url, APP) if mode == "own" else LoadRegistry(redis_url, APP, NUM_ROUTERS)
    router = Router(registry)

    async def pick() -> str:
        return router.pick(REQUEST_WITHOUT_PREFIX, dict.fromkeys(REPLICAS, 0))

    await pick()
    await asyncio.sleep(0.3)
    yield pick
    await registry.close()


REQUEST_WITHOUT_PREFIX = GenerationRequest("r", (1, 2, 3))


async def measure_herding(mode: str, redis_url: str, seed: int) -> dict[str, float]:
    """Differences between the fullest and the emptiest replica in requests held."""
    draw = random.Random(seed)
    async with Replicas(redis_url) as replicas:
        contexts = [picker(mode, redis_url) for _ in range(NUM_ROUTERS)]
        picks = [await context.__aenter__() for context in contexts]
        waited_s: list[float] = []

        async def send(pick: Pick, hold_s: float) -> None:
            started_s = time.perf_counter()
            name = await pick()
            waited_s.append(time.perf_counter() - started_s)
            replicas.take(name, hold_s)

        async with asyncio.TaskGroup() as group:
            end_s = time.monotonic() + RUN_S
            while time.monotonic() < end_s:
                await asyncio.sleep(draw.expovariate(RATE_PER_S))
                group.create_task(send(draw.choice(picks), draw.expovariate(1 / HOLD_S)))
        poisson = list(replicas.imbalances)
        bursts = []
        for _ in range(NUM_BURSTS):
            await asyncio.sleep(3 * HOLD_S / 10)
            before = dict(replicas.held)
            await asyncio.gather(*(send(picks[i % NUM_ROUTERS], HOLD_S / 5) for i in range(BURST)))
            got = [replicas.held[name] - before[name] for name in REPLICAS]
            bursts.append(max(got) - min(got))
        for context in contexts:
            await context.__aexit__(None, None, None)
    return {
        "poisson_imbalance_mean": statistics.mean(poisson),
        "poisson_imbalance_p99": nearest_rank(poisson, 99),
        "burst_imbalance_mean": statistics.mean(bursts),
        "pick_ms_p50": 1e3 * nearest_rank(waited_s, 50),
        "pick_ms_p99": 1e3 * nearest_rank(waited_s, 99),
    }


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


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "serving.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, RedisServer(Path(directory)) as redis:
        picks = asyncio.run(measure_picks(redis))
        redis.stop()  # the one that was restarted ends with the thread that did it
        redis.start()
        herding = {
            mode: asyncio.run(measure_herding(mode, redis.url, arguments.seed))
            for mode in ("own", "counted", "reserve")
        }
    update_result(
        arguments.out,
        {
            "route_ms_p50": picks["well"]["p50"],
            "routing": {"seed": arguments.seed, "pick_ms": picks, "herding": herding},
        },
    )
    rows = [(state, *(f"{value:.3f}" for value in times.values())) for state, times in picks.items()]
    print(markdown_table(("Redis", "pick p50 (ms)", "p99", "max"), rows), "\n")
    rows = [(mode, *(f"{value:.2f}" for value in figures.values())) for mode, figures in herding.items()]
    print(markdown_table(("picks", "imbalance, mean", "p99", "in bursts", "pick p50 (ms)", "p99"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
