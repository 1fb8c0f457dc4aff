"""Rates over a real Redis that is shared, slow or gone; and what the controller tells through it."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
from redis import Redis

from cluster.admission.buckets import Grant, Levels, RateKind, Rates, full, refill, take
from cluster.admission.promises import PromiseReader
from cluster.admission.rates import TenantRates
from cluster.admission.shared import LIMIT_S, Missed, SharedBuckets, rate_key
from cluster.local.redis_server import RedisServer
from controller.arbiter import ArbiterObservation
from controller.config import ControllerConfig
from controller.ledger import DecisionLedger
from controller.settings import SettingsStore
from controller.state import ControllerState
from tests.integration.control_harness import make_patient
from tests.integration.served_api import MODEL
from tests.waiting import TIMEOUT_S, until_async

PREFIX = "brownoutserve:test"
SLOW = Rates(requests=6, tokens=600)  # nothing worth noticing flows in while a test runs


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


@pytest_asyncio.fixture
async def connected(redis: RedisServer) -> AsyncIterator[Callable[[], Any]]:
    """Makes views of the shared buckets, each as another ingress process would have it."""
    views: list[SharedBuckets] = []

    async def view() -> SharedBuckets:
        shared = SharedBuckets(redis.url, PREFIX)
        views.append(shared)
        shared.start()
        await until_async(lambda: shared.reachable)
        return shared

    yield view
    for shared in views:
        await shared.close()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer of Redis comes too late, however busy the machine is."""
    monkeypatch.setattr("cluster.admission.shared.LIMIT_S", 30.0)
    monkeypatch.setattr("cluster.router.loads.TIMEOUT_S", 60.0)


@pytest.mark.usefixtures("patient")
async def test_the_script_does_what_the_buckets_do(connected: Any) -> None:
    """But for what flows in between our looks at the clock."""
    shared, draw = await connected(), random.Random(3)
    for number, rates in enumerate((SLOW, Rates(tokens=50), Rates(requests=4), Rates())):
        tenant, levels, taken_s = f"tenant-{number}", full(rates), time.monotonic()
        for _ in range(40):
            wanted = draw.uniform(0, 90)
            asked_s = time.monotonic()
            grant = await shared.take(tenant, rates, 1, wanted)
            assert isinstance(grant, Grant)
            least = take(levels, rates, 1, wanted)
            most = take(refill(levels, rates, time.monotonic() - taken_s), rates, 1, wanted)
            assert grant.short in (least.short, most.short)
            if least.short is most.short:
                for kind in ("requests", "tokens"):
                    if getattr(rates, kind) is not None:
                        level = getattr(grant.levels, kind)
                        assert getattr(least.levels, kind) - 0.01 <= level <= getattr(most.levels, kind) + 0.01
            levels, taken_s = grant.levels, asked_s


@pytest.mark.usefixtures("patient")
async def test_processes_share_one_rate_and_its_key_does_not_stay(connected: Any, redis: RedisServer) -> None:
    ours, theirs = await connected(), await connected()
    begun_s = time.monotonic()
    grants = [await view.take("acme", SLOW, 1, 10) for view in (ours, theirs) * 5]
    shorts = [grant.short for grant in grants]
    assert shorts[:6] == [None] * 6 and set(shorts) <= {None, RateKind.REQUESTS}
    assert shorts.count(None) <= 6 + (time.monotonic() - begun_s) / 10
    ours.settle("acme", SLOW, 0, -40)
    await until_level(theirs, 580)
    with Redis.from_url(redis.url) as store:
        (key,) = store.keys("*")
        assert key.decode() == rate_key(PREFIX, "acme") == "brownoutserve:test:rate:{acme}"
        assert 0 < store.ttl(key) <= 62


async def until_level(shared: SharedBuckets, tokens: float) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while (await shared.take("acme", SLOW, 99, 0)).levels.tokens < tokens:
            await asyncio.sleep(0.01)


@pytest.mark.usefixtures("patient")
async def test_without_redis_each_process_has_its_part_and_nobody_waits(
    connected: Any, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing flows into this process's part: its clock stands still."""
    monkeypatch.setattr("cluster.admission.rates.time", SimpleNamespace(monotonic=lambda: 1000.0))
    rates = TenantRates(await connected(), num_ingress=2)
    begun_s = time.monotonic()
    answer = await rates.take("acme", SLOW, 10)
    assert answer.short is None
    assert redis.pid is not None
    os.kill(redis.pid, signal.SIGKILL)
    async with asyncio.timeout(25):  # less than an answer may take
        answers = [await rates.take("acme", SLOW, 10) for _ in range(6)]
    assert [answer.short for answer in answers] == [None, None, RateKind.REQUESTS] + [RateKind.REQUESTS] * 3
    # Three a minute are this process's part; half of the five that Redis last said were left, less two, is a half.
    # What has flowed in at Redis before it said so, a sixth of a request a second, makes it a little less.
    assert 10 - (time.monotonic() - begun_s) <= answers[-1].retry_after_s <= 10.01
    assert rates.early_refusal("acme") is not None
    redis.start()
    await until_async(lambda: rates.are_shared)
    assert (await rates.take("other", SLOW, 10)).levels.requests == pytest.approx(5, abs=0.01)
    begun_s = time.monotonic()
    # The new Redis knows nothing, but is told of the two that were granted without it; with this one that is three.
    left = (await rates.take("acme", SLOW, 10)).levels.requests
    assert 2.99 <= left <= 3.01 + (time.monotonic() - begun_s) / 10


async def test_a_slow_redis_costs_a_request_no_more_than_the_limit(
    connected: Any, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.router.loads.TIMEOUT_S", 60.0)  # what a request would wait that waits for Redis
    shared = await connected()
    assert redis.pid is not None
    os.kill(redis.pid, signal.SIGSTOP)
    try:
        await until_async(lambda: "T" in Path(f"/proc/{redis.pid}/stat").read_text().rpartition(")")[2].split())
        begun_s = time.monotonic()
        missed = [await shared.take("acme", SLOW, 1, 1) for _ in range(6)]
        assert LIMIT_S * 3 <= time.monotonic() - begun_s < 55
        assert missed == [Missed.LATE] * 3 + [Missed.AWAY] * 3  # nobody asks any more
        assert not shared.reachable
    finally:
        os.kill(redis.pid, signal.SIGCONT)
    await until_async(lambda: shared.reachable)


async def test_what_the_arbiter_saw_reaches_the_ingress(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    make_patient(monkeypatch)
    monkeypatch.setattr("controller.settings.PROMISE_LIFE_S", 600.0)
    monkeypatch.setattr("cluster.admission.promises.STALE_S", 600.0)
    state = ControllerState(ControllerConfig())
    seen = ArbiterObservation(ttft_slo_s=1.0, ttft_level0_s=0.7, ttft_dimmed_s=0.3, num_replicas=2, max_replicas=4)
    state.control_of(MODEL).promise = seen
    state.control_of("unknown load").promise = ArbiterObservation(1.0, None)
    store = SettingsStore(redis.url, PREFIX)
    reader = PromiseReader(redis.url, PREFIX, [MODEL, "unknown load", "nobody"])
    await store.save(state.to_save(0.0), DecisionLedger())
    reader.start()
    await until_async(lambda: reader.promise(MODEL) is not None)
    assert reader.promise(MODEL) == seen
    assert reader.promise("unknown load") == ArbiterObservation(1.0, None)
    assert reader.promise("nobody") is None
    with Redis.from_url(redis.url) as client:
        assert all(client.ttl(key) > 0 for key in client.keys("*promise*"))
    await reader.close()
    await store.close()


def test_levels_without_a_limit_mean_nothing() -> None:
    assert full(Rates()) == Levels(0.0, 0.0)
