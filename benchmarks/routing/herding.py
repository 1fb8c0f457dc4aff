"""How evenly several routers spread requests that they cannot see of each other, by how they tell of their picks."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

from benchmarks.report import nearest_rank
from cluster.router.loads import LoadPublisher, connect
from cluster.router.policy import Picked, ReplicaLoad
from cluster.router.registry import LoadRegistry
from cluster.router.router import Router
from engine.types import GenerationRequest

APP = "routing"
REPLICAS = ("r0", "r1", "r2", "r3")
NUM_ROUTERS = 4
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
