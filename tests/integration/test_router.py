"""The router of an ingress over a real Redis: by the replicas' load while it can, by its own while it cannot."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from cluster.local.redis_server import RedisServer
from cluster.router.loads import LoadPublisher, load_key
from cluster.router.policy import ReplicaLoad
from cluster.router.registry import LoadRegistry
from cluster.router.router import Router, home_of
from engine.types import GenerationRequest
from tests.integration.control_harness import TcpProxy
from tests.waiting import until_async

APP = "app"
REPLICAS = ("a", "b", "c")
REQUEST = GenerationRequest("r", (1, 2, 3))
LOAD = ReplicaLoad(0, 0, 0, max_num_seqs=8, queued_prefill_tokens=0, max_num_batched_tokens=256, kv_used_frac=0.0)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been published stays known, and no answer of Redis comes too late, however busy the machine is."""
    monkeypatch.setattr("cluster.router.loads.LEASE_S", 600.0)
    monkeypatch.setattr("cluster.router.loads.TIMEOUT_S", 60.0)
    monkeypatch.setattr("cluster.router.registry.STALE_S", 600.0)


@pytest_asyncio.fixture
async def redis(tmp_path: Path) -> AsyncIterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


@pytest_asyncio.fixture
async def loads(redis: RedisServer) -> AsyncIterator[dict[str, ReplicaLoad]]:
    """What each replica publishes; change it as you like."""
    loads = dict.fromkeys(REPLICAS, LOAD)

    def publisher(name: str) -> LoadPublisher:
        return LoadPublisher(redis.url, APP, name, lambda sequence: replace(loads[name], sequence=sequence))

    publishers = [publisher(name) for name in loads]
    for each in publishers:
        each.start()
    yield loads
    for each in publishers:
        await each.stop()


class Ingress:
    """A router, and the requests that its process holds at each replica."""

    def __init__(self, redis_url: str) -> None:
        self.registry = LoadRegistry(redis_url, APP)
        self.router = Router(self.registry)
        self.held = dict.fromkeys(REPLICAS, 0)

    def send(self, request: GenerationRequest = REQUEST) -> str:
        replica_id = self.router.pick(request, self.held)
        self.held[replica_id] += 1
        return replica_id


@pytest_asyncio.fixture
async def ingress(redis: RedisServer) -> AsyncIterator[Ingress]:
    ingress = Ingress(redis.url)
    yield ingress
    await ingress.registry.close()


@pytest.mark.usefixtures("patient")
async def test_the_least_loaded_replica_is_picked(ingress: Ingress, loads: dict[str, ReplicaLoad]) -> None:
    loads["a"] = replace(LOAD, num_running=6)
    loads["b"] = replace(LOAD, num_running=8, num_waiting=9)
    ingress.registry.watch(REPLICAS)
    await until_async(lambda: {n: replace(x, sequence=0) for n, x in ingress.registry.loads().items()} == loads)
    assert ingress.send() == "c"


@pytest.mark.usefixtures("patient")
async def test_the_first_request_of_a_process_knows_the_loads_too(
    redis: RedisServer, ingress: Ingress, loads: dict[str, ReplicaLoad], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.router.router.FIRST_LOADS_S", 60.0)  # however busy the machine is
    loads |= {"a": replace(LOAD, num_running=6), "b": replace(LOAD, num_running=8, num_waiting=9)}
    older = LoadRegistry(redis.url, APP)
    older.watch(REPLICAS)
    await until_async(lambda: sorted(load.held for load in older.loads().values()) == [0, 6, 17])
    await older.close()
    await ingress.router.wait_for_loads(REPLICAS)
    assert ingress.send() == "c"


async def test_the_first_request_does_not_wait_for_a_redis_that_hangs(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.router.loads.TIMEOUT_S", 60.0)  # of the Redis call, which goes on
    password, place = urlsplit(redis.url).password, f"127.0.0.1:{urlsplit(redis.url).port}"
    async with TcpProxy(place) as proxy:
        proxy.cut()
        ingress = Ingress(f"redis://:{password}@{proxy.address}/0")
        started_s = time.monotonic()
        await ingress.router.wait_for_loads(REPLICAS)
        assert time.monotonic() - started_s < 55
        assert ingress.send() in REPLICAS
        await ingress.registry.close()


@pytest.mark.usefixtures("patient")
async def test_simultaneous_requests_spread_evenly(ingress: Ingress, loads: dict[str, ReplicaLoad]) -> None:
    ingress.registry.watch(REPLICAS)
    await until_async(lambda: len(ingress.registry.loads()) == 3)
    assert Counter(ingress.send() for _ in range(30)) == dict.fromkeys(REPLICAS, 10)


@pytest.mark.usefixtures("patient")
async def test_a_session_and_a_prompt_stay_where_they_were(ingress: Ingress, loads: dict[str, ReplicaLoad]) -> None:
    ingress.registry.watch(REPLICAS)
    await until_async(lambda: len(ingress.registry.loads()) == 3)
    first = ingress.send(replace(REQUEST, prompt_ids=tuple(range(200))))
    assert ingress.send(replace(REQUEST, prompt_ids=(*range(200), 5))) == first
    homes = Counter(home_of(f"session {number}", REPLICAS) for number in range(300))
    assert min(homes.values()) > 60
    home = home_of("session 1", REPLICAS)
    assert ingress.send(replace(REQUEST, session_id="session 1")) == home


async def test_redis_dies_and_comes_back(redis: RedisServer, ingress: Ingress, loads: dict[str, ReplicaLoad]) -> None:
    """Without loads, the requests that this process holds decide; no pick ever waits."""
    ingress.registry.watch(REPLICAS)
    await until_async(lambda: len(ingress.registry.loads()) == 3)
    redis.stop()
    await until_async(lambda: not ingress.registry.loads())
    ingress.held = {"a": 5, "b": 0, "c": 5}
    assert [ingress.send() for _ in range(5)] == ["b"] * 5
    assert set(ingress.held.values()) == {5}
    redis.start()
    await until_async(lambda: len(ingress.registry.loads()) == 3)


async def test_a_redis_that_answers_late_or_hangs_holds_up_no_pick(
    redis: RedisServer, loads: dict[str, ReplicaLoad], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop, on which requests are routed, stays free as well."""
    monkeypatch.setattr("cluster.router.loads.TIMEOUT_S", 2.0)  # of the calls that a pick does not wait for
    password, place = urlsplit(redis.url).password, f"127.0.0.1:{urlsplit(redis.url).port}"
    async with TcpProxy(place) as proxy:
        ingress = Ingress(f"redis://:{password}@{proxy.address}/0")
        ingress.registry.watch(REPLICAS)
        await until_async(lambda: len(ingress.registry.loads()) == 3)
        proxy.cut()
        await until_async(lambda: not ingress.registry.loads())
        started_s = time.monotonic()
        for _ in range(60):
            ingress.send()
            await asyncio.sleep(0.005)
        assert set(ingress.held.values()) == {20}
        assert time.monotonic() - started_s < 60  # picks that wait for Redis would take twice that
        proxy.heal()
        await until_async(lambda: len(ingress.registry.loads()) == 3)
        await ingress.registry.close()


async def test_a_flushed_redis_is_filled_again(
    redis: RedisServer, ingress: Ingress, loads: dict[str, ReplicaLoad]
) -> None:
    ingress.registry.watch(REPLICAS)
    await until_async(lambda: len(ingress.registry.loads()) == 3)
    ingress.send()
    client = Redis.from_url(redis.url)
    for _ in range(20):
        await client.flushall()
        assert ingress.send() in REPLICAS
        await asyncio.sleep(0.01)
    await client.aclose()
    await until_async(lambda: len(ingress.registry.loads()) == 3)
    await until_async(lambda: not ingress.registry.picked())  # counts of before do not come back


async def test_without_redis_or_with_nonsense_in_it_the_own_load_decides(redis: RedisServer) -> None:
    client = Redis.from_url(redis.url)
    for replica_id in REPLICAS:
        await client.set(load_key(APP, replica_id), b"\x80 not a load")
    await client.aclose()
    for url in (redis.url, "redis://127.0.0.1:1/0"):
        ingress = Ingress(url)
        assert Counter(ingress.send() for _ in range(30)) == dict.fromkeys(REPLICAS, 10)
        await asyncio.sleep(0.2)
        assert Counter(ingress.send() for _ in range(30)) == dict.fromkeys(REPLICAS, 10)
        await ingress.registry.close()
