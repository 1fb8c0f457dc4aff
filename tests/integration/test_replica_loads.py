"""Loads on their way from replicas to routers through a real Redis, which may die and come back."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from cluster.local.redis_server import RedisServer
from cluster.router.loads import PUBLISH_PERIOD_S, LoadPublisher
from cluster.router.policy import Picked, ReplicaLoad, rank
from cluster.router.registry import STALE_S, LoadRegistry
from engine.step_time import StepTimeModel
from engine.types import EngineDeadError, PhaseSetting
from tests.waiting import TIMEOUT_S, until_async

APP = "app"
LOAD = ReplicaLoad(0, 0, 0, max_num_seqs=8, queued_prefill_tokens=0, max_num_batched_tokens=256, kv_used_frac=0.0)


class Replica:
    """What a publisher publishes for; its load can be set, its engine can die, its publications can stand still."""

    def __init__(self, redis_url: str, replica_id: str) -> None:
        self.load = LOAD
        self.dead = False
        self.frozen = False
        self.fault: Exception | None = None
        self.sequence = 0
        self.publisher = LoadPublisher(redis_url, APP, replica_id, self._take_load)

    def _take_load(self, sequence: int) -> ReplicaLoad:
        if self.dead:
            raise EngineDeadError("dead")
        if self.fault is not None:
            raise self.fault
        if not self.frozen:
            self.sequence = sequence
        return replace(self.load, sequence=self.sequence)


@pytest_asyncio.fixture
async def redis(tmp_path: Path) -> AsyncIterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


@pytest_asyncio.fixture
async def replicas(redis: RedisServer) -> AsyncIterator[dict[str, Replica]]:
    replicas = {replica_id: Replica(redis.url, replica_id) for replica_id in ("a", "b")}
    for replica in replicas.values():
        replica.publisher.start()
    yield replicas
    for replica in replicas.values():
        await replica.publisher.stop()


@pytest_asyncio.fixture
async def registry(redis: RedisServer, replicas: dict[str, Replica]) -> AsyncIterator[LoadRegistry]:
    registry = LoadRegistry(redis.url, APP)
    registry.watch(["a", "b", "never started"])
    await until_async(lambda: len(registry.loads()) == 2)
    yield registry
    await registry.close()


def best(registry: LoadRegistry) -> str | None:
    order = rank(["a", "b"], registry.loads(), registry.picked(), random.Random(0).random)
    return order[0] if order else None


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been published stays known, and no answer of Redis comes too late, however busy the machine is."""
    monkeypatch.setattr("cluster.router.loads.LEASE_S", 600.0)
    monkeypatch.setattr("cluster.router.loads.TIMEOUT_S", 60.0)
    monkeypatch.setattr("cluster.router.registry.STALE_S", 600.0)
    monkeypatch.setattr("cluster.router.registry.PICKS_TTL_S", 600.0)


@pytest.mark.usefixtures("patient")
async def test_loads_arrive_and_change(replicas: dict[str, Replica], registry: LoadRegistry) -> None:
    assert set(registry.loads()) == {"a", "b"}
    model, unlimited = StepTimeModel((1, 8), ((0.1, 0.2),), trim=1.5), PhaseSetting(0, 2, float("inf"))
    changed = replace(LOAD, num_running=5, num_waiting=2, kv_used_frac=0.5, step_time=model, decode=unlimited)
    replicas["a"].load = changed
    await until_async(lambda: "a" in registry.loads() and registry.loads()["a"].num_waiting == 2)
    assert replace(registry.loads()["a"], sequence=0) == changed
    await until_async(lambda: best(registry) == "b")


@pytest.mark.usefixtures("patient")
async def test_own_picks_count_until_the_published_load_shows_them(registry: LoadRegistry) -> None:
    await until_async(lambda: best(registry))
    for _ in range(10):
        registry.count_pick(best(registry))
    assert registry.picked() == {"a": Picked(5), "b": Picked(5)}
    await until_async(lambda: not registry.picked())


@pytest.mark.usefixtures("patient")
async def test_picks_of_other_processes_count_too(
    redis: RedisServer, replicas: dict[str, Replica], registry: LoadRegistry
) -> None:
    other = LoadRegistry(redis.url, APP)
    other.watch(["a", "b"])
    replicas["a"].frozen = True  # no publication shows the picks
    for each in (registry, other):
        await until_async(lambda each=each: "a" in each.loads() and sequence_of_a(each) == replicas["a"].sequence)
    for _ in range(3):
        registry.count_pick("a", prompt_tokens=100)
    await until_async(lambda: other.picked() == {"a": Picked(3, prompt_tokens=300)})
    await until_async(lambda: best(other) == "b")
    replicas["a"].frozen = False
    await until_async(lambda: not other.picked())
    await other.close()


def sequence_of_a(registry: LoadRegistry) -> int:
    return registry.loads()["a"].sequence


async def test_nothing_stays_in_redis(redis: RedisServer, replicas: dict[str, Replica], registry: LoadRegistry) -> None:
    registry.count_pick("a")
    await until_async(lambda: not registry.picked())
    await registry.close()
    for replica in replicas.values():
        await replica.publisher.stop()
    client = Redis.from_url(redis.url)
    async with asyncio.timeout(TIMEOUT_S):
        while await client.keys():
            await asyncio.sleep(0.05)
    await client.aclose()


async def test_another_application_is_not_seen(redis: RedisServer, registry: LoadRegistry) -> None:
    other = LoadRegistry(redis.url, "other")
    other.watch(["a", "b"])
    await asyncio.sleep(3 * STALE_S / 10)
    assert not other.loads()
    await other.close()


@pytest.fixture
def long_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that is gone has been withdrawn, it has not expired."""
    monkeypatch.setattr("cluster.router.loads.LEASE_S", 600.0)
    monkeypatch.setattr("cluster.router.loads.TIMEOUT_S", 60.0)


@pytest.mark.usefixtures("long_lease")
async def test_a_stopped_or_dead_replica_is_unknown_at_once(
    replicas: dict[str, Replica], registry: LoadRegistry
) -> None:
    replicas["a"].dead = True
    await until_async(lambda: set(registry.loads()) == {"b"})
    await replicas["b"].publisher.stop()
    await until_async(lambda: not registry.loads())
    replicas["a"].dead = False  # it had only stalled
    await until_async(lambda: set(registry.loads()) == {"a"})


async def test_a_load_that_cannot_be_told_is_logged_once_and_tried_again(
    replicas: dict[str, Replica], registry: LoadRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    def faults() -> list[str]:
        return [str(r.exc_info) for r in caplog.records if (r.name, r.levelname) == ("cluster.router.loads", "ERROR")]

    replicas["a"].fault = ZeroDivisionError("a fault of ours")
    await until_async(lambda: set(registry.loads()) == {"b"})
    await asyncio.sleep(3 * PUBLISH_PERIOD_S)
    (fault,) = faults()
    assert "a fault of ours" in fault
    replicas["a"].fault = None
    await until_async(lambda: set(registry.loads()) == {"a", "b"})


async def test_redis_dies_and_comes_back(
    redis: RedisServer, replicas: dict[str, Replica], registry: LoadRegistry
) -> None:
    redis.stop()
    await until_async(lambda: best(registry) is None)  # no opinion: the router goes by its own count
    redis.start()
    await until_async(lambda: best(registry) is not None)
