"""The Serve request router over a real Redis: by load while it can, by Serve's own choice while it cannot."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest_asyncio
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID

from cluster.redis_server import RedisServer
from cluster.router.loads import LoadPublisher, connect, load_key
from cluster.router.router import RedisRouter
from engine.types import EngineStats

APP = "app"
DEPLOYMENT = DeploymentID("EngineReplica", APP)


@dataclass
class Candidate:
    """What of Serve's RunningReplica a router looks at."""

    replica_id: ReplicaID
    node_id: str = "node"
    availability_zone: str | None = None
    max_ongoing_requests: int = 100
    multiplexed_model_ids: set[str] = field(default_factory=set)

    async def get_queue_len(self, deadline_s: float) -> int:
        return 0

    @property
    def name(self) -> str:
        return self.replica_id.unique_id


CANDIDATES = [Candidate(ReplicaID(name, DEPLOYMENT)) for name in ("a", "b", "c")]


async def until(holds: Callable[[], Any], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not await holds():
        assert time.monotonic() < deadline_s, f"waited {timeout_s} s in vain"
        await asyncio.sleep(0.02)


def make_router(redis_url: str) -> RedisRouter:
    router = RedisRouter(
        deployment_id=DEPLOYMENT, handle_source=DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=False
    )
    router.initialize_state(redis_url=redis_url)
    router.update_replicas(CANDIDATES)
    return router


async def ranks(router: RedisRouter) -> list[list[str]]:
    chosen = await router.choose_replicas(CANDIDATES)
    return [[candidate.name for candidate in rank] for rank in chosen]


@pytest_asyncio.fixture
async def redis(tmp_path: Path) -> AsyncIterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


@pytest_asyncio.fixture
async def loads(redis: RedisServer) -> AsyncIterator[dict[str, EngineStats]]:
    """What each replica publishes; change it as you like."""
    loads = {candidate.name: EngineStats(max_num_seqs=8) for candidate in CANDIDATES}

    def publisher(name: str) -> LoadPublisher:
        return LoadPublisher(redis.url, APP, name, lambda: loads[name], max_num_batched_tokens=256)

    publishers = [publisher(name) for name in loads]
    for each in publishers:
        each.start()
    yield loads
    for each in publishers:
        await each.stop()


def is_by_load(choice: list[list[str]]) -> bool:
    return sorted(choice) == [["a"], ["b"], ["c"]]  # three ranks of one; Serve's own choice is one rank of two


async def test_the_least_loaded_replica_comes_first(redis: RedisServer, loads: dict[str, EngineStats]) -> None:
    loads["a"] = EngineStats(num_running=6, max_num_seqs=8)
    loads["b"] = EngineStats(num_running=8, num_waiting=9, max_num_seqs=8)
    router = make_router(redis.url)

    async def ordered() -> bool:
        return await ranks(router) == [["c"], ["a"], ["b"]]

    await until(ordered)


async def test_simultaneous_requests_spread_evenly(redis: RedisServer, loads: dict[str, EngineStats]) -> None:
    router = make_router(redis.url)

    async def by_load() -> bool:
        return is_by_load(await ranks(router))

    await until(by_load)
    await asyncio.sleep(0.5)  # until the picks made while waiting are forgotten
    firsts = Counter([(await ranks(router))[0][0] for _ in range(30)])
    assert firsts == {"a": 10, "b": 10, "c": 10}


async def test_redis_dies_and_comes_back(redis: RedisServer, loads: dict[str, EngineStats]) -> None:
    router = make_router(redis.url)

    async def by_load() -> bool:
        return is_by_load(await ranks(router))

    async def by_serve() -> bool:
        choice = await ranks(router)
        return len(choice) == 1 and len(set(choice[0])) == 2

    await until(by_load)
    redis.stop()
    await until(by_serve)
    redis.start()
    await until(by_load)


async def test_without_redis_or_with_nonsense_in_it_serve_chooses(redis: RedisServer) -> None:
    client = connect(redis.url)
    for candidate in CANDIDATES:
        await client.set(load_key(APP, candidate.name), b"\x80 not a load")
    await client.aclose()
    for url in (redis.url, "redis://127.0.0.1:1/0"):
        router = make_router(url)
        for _ in range(5):
            assert len((await ranks(router))[0]) == 2
            await asyncio.sleep(0.05)
