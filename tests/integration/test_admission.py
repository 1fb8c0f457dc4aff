"""Rates over a real Redis that is shared, slow or gone; queues, refusals and their headers over a real engine."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from cluster.admission.buckets import Grant, Levels, RateKind, Rates, full, take
from cluster.admission.config import AdmissionSection
from cluster.admission.key_store import FileKeyStore
from cluster.admission.key_watch import KeyWatch
from cluster.admission.keys import new_key
from cluster.admission.promises import PromiseReader
from cluster.admission.rates import TenantRates
from cluster.admission.shared import LIMIT_S, Missed, SharedBuckets, rate_key
from cluster.admission.tenants import TenantLimits
from cluster.config import IngressSection
from cluster.ingress.admission import Admission
from cluster.ingress.auth import Authenticator
from cluster.ingress.routes import create_api
from cluster.ingress.service import OpenAIService, ServedModel
from cluster.redis_server import RedisServer
from controller.arbiter import ArbiterObservation
from controller.config import ControllerConfig
from controller.ledger import DecisionLedger
from controller.settings import SettingsStore
from controller.state import ControllerState
from engine.async_engine import AsyncEngine
from tests.integration.in_process_backend import InProcessBackend
from tests.integration.served_api import MODEL, engine_config
from tests.models import write_config

PREFIX = "brownoutserve:test"
SLOW = Rates(requests=6, tokens=600)  # nothing worth noticing flows in while a test runs


async def until(holds: Callable[[], object], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not holds():
            await asyncio.sleep(0.005)


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
        await until(lambda: shared.reachable)
        return shared

    yield view
    for shared in views:
        await shared.close()


async def certainly(shared: SharedBuckets, *args: Any) -> Any:
    """On a machine so busy that an answer takes longer than LIMIT_S now and then."""
    while True:
        await until(lambda: shared.reachable)
        if isinstance(grant := await shared.take(*args), Grant):
            return grant


async def test_the_script_does_what_the_buckets_do(connected: Any) -> None:
    shared, draw = await connected(), random.Random(3)
    for number, rates in enumerate((SLOW, Rates(tokens=50), Rates(requests=4), Rates())):
        tenant, levels = f"tenant-{number}", full(rates)
        for _ in range(40):
            wanted = draw.uniform(0, 90)
            expected = take(levels, rates, 1, wanted)
            grant = await shared.take(tenant, rates, 1, wanted)
            if isinstance(grant, Missed):  # too late, so what it took is not known
                return
            assert grant.short is expected.short
            levels = grant.levels
            for kind in ("requests", "tokens"):
                if getattr(rates, kind) is not None:
                    assert getattr(levels, kind) == pytest.approx(getattr(expected.levels, kind), abs=2.0)


async def test_processes_share_one_rate_and_its_key_does_not_stay(connected: Any, redis: RedisServer) -> None:
    ours, theirs = await connected(), await connected()
    grants = [await certainly(view, "acme", SLOW, 1, 10) for view in (ours, theirs) * 5]
    assert [grant.short for grant in grants] == [None] * 6 + [RateKind.REQUESTS] * 4
    ours.settle("acme", SLOW, 0, -40)
    await until_level(theirs, 580)
    with Redis.from_url(redis.url) as store:
        (key,) = store.keys("*")
        assert key.decode() == rate_key(PREFIX, "acme") == "brownoutserve:test:rate:{acme}"
        assert 0 < store.ttl(key) <= 62


async def until_level(shared: SharedBuckets, tokens: float) -> None:
    async with asyncio.timeout(10):
        while (await certainly(shared, "acme", SLOW, 99, 0)).levels.tokens < tokens:
            await asyncio.sleep(0.01)


async def test_without_redis_each_process_has_its_part_and_nobody_waits(connected: Any, redis: RedisServer) -> None:
    rates = TenantRates(await connected(), num_ingress=2)
    answer = await rates.take("acme", SLOW, 10)
    assert answer.short is None
    assert redis.pid is not None
    os.kill(redis.pid, signal.SIGKILL)
    answers, slowest_s = [], 0.0
    for _ in range(6):
        begun_s = time.monotonic()
        answers.append(await rates.take("acme", SLOW, 10))
        slowest_s = max(slowest_s, time.monotonic() - begun_s)
    assert [answer.short for answer in answers] == [None, None, RateKind.REQUESTS] + [RateKind.REQUESTS] * 3
    # Three a minute are this process's part; half of the five that Redis last said were left, less two, is a half.
    assert answers[-1].retry_after_s == pytest.approx(10, rel=0.1)
    assert rates.early_refusal("acme") is not None
    assert slowest_s < LIMIT_S + 0.1
    redis.start()
    await until(lambda: rates.are_shared)
    assert (await rates.take("other", SLOW, 10)).levels.requests == pytest.approx(5, abs=0.5)
    # The new Redis knows nothing, but is told of the two that were granted without it; with this one that is three.
    assert (await rates.take("acme", SLOW, 10)).levels.requests == pytest.approx(3, abs=0.5)


async def test_a_slow_redis_costs_a_request_no_more_than_the_limit(connected: Any, redis: RedisServer) -> None:
    shared = await connected()
    assert redis.pid is not None
    os.kill(redis.pid, signal.SIGSTOP)
    try:
        late = [await timed(shared, Missed.LATE) for _ in range(3)]
        assert all(LIMIT_S * 0.9 <= took_s < LIMIT_S + 0.1 for took_s in late)
        assert not shared.reachable
        assert await timed(shared, Missed.AWAY) < LIMIT_S * 0.9  # nobody asks any more
    finally:
        os.kill(redis.pid, signal.SIGCONT)
    await until(lambda: shared.reachable)


async def timed(shared: SharedBuckets, expected: Missed) -> float:
    begun_s = time.monotonic()
    assert await shared.take("acme", SLOW, 1, 1) is expected
    return time.monotonic() - begun_s


async def test_what_the_arbiter_saw_reaches_the_ingress(redis: RedisServer) -> None:
    state = ControllerState(ControllerConfig())
    seen = ArbiterObservation(ttft_slo_s=1.0, ttft_level0_s=0.7, ttft_dimmed_s=0.3, num_replicas=2, max_replicas=4)
    state.control_of(MODEL).promise = seen
    state.control_of("unknown load").promise = ArbiterObservation(1.0, None)
    store = SettingsStore(redis.url, PREFIX)
    reader = PromiseReader(redis.url, PREFIX, [MODEL, "unknown load", "nobody"])
    await store.save(state.to_save(0.0), DecisionLedger())
    reader.start()
    await until(lambda: reader.promise(MODEL) is not None)
    assert reader.promise(MODEL) == seen
    assert reader.promise("unknown load") == ArbiterObservation(1.0, None)
    assert reader.promise("nobody") is None
    with Redis.from_url(redis.url) as client:
        assert all(client.ttl(key) > 0 for key in client.keys("*promise*"))
    await reader.close()
    await store.close()


# --- over HTTP -------------------------------------------------------------------------------------------------------

COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": [5, 6, 7, 8], "max_tokens": 6, "temperature": 0}
LONG = {**COMPLETION, "max_tokens": 900, "extra_body": {"ignore_eos": True}}
OTHER = "other"  # a second model, on the same engine
TENANTS = {
    "rated": TenantLimits(requests_per_minute=3),
    "metered": TenantLimits(tokens_per_minute=40),
    "narrow": TenantLimits(max_concurrent=1, max_queued=2),
    "flood": TenantLimits(max_queued=100, ttft_s=60),
    "calm": TenantLimits(),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AsyncEngine]:
    path = write_config(tmp_path_factory.mktemp("models") / MODEL, max_position_embeddings=1024)
    engine = await AsyncEngine.start(engine_config(path))
    yield engine
    await engine.stop()


class Server:
    """An API with admission, and a client for each tenant."""

    def __init__(self, engine: AsyncEngine, store: FileKeyStore) -> None:
        section = AdmissionSection(tenants=TENANTS, in_flight_frac=0.5, max_wait_s=20.0)
        self.engine = engine
        self.admission = Admission(section, 1, {MODEL: 1.0, OTHER: 1.0}, TenantRates(None, 1), draw=lambda: 0.5)
        keys: dict[str, str] = {}
        for tenant in TENANTS:
            keys[tenant], record = new_key(tenant, 0.0)
            store.add(record)
        models = [ServedModel(name, InProcessBackend(engine), engine.tokenizer) for name in (MODEL, OTHER)]
        auth = Authenticator(section, KeyWatch([store]), "admin")
        service = OpenAIService(models, IngressSection(admin_token="admin"), "i", auth=auth, admission=self.admission)
        transport = httpx.ASGITransport(create_api(service))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60)
        self.keys = keys

    def __getitem__(self, tenant: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url="http://test/v1", api_key=self.keys[tenant], http_client=self.http, max_retries=0
        )

    def flow(self, tenant: str) -> Any:
        return self.admission.lanes[MODEL].queue.flow(tenant, 1.0, TENANTS[tenant].max_concurrent)


@pytest_asyncio.fixture(loop_scope="module")
async def server(engine: AsyncEngine, tmp_path: Path) -> AsyncIterator[Server]:
    server = Server(engine, FileKeyStore(tmp_path / "keys.json"))
    yield server
    await until(lambda: engine.stats().num_running == 0)
    assert server.admission.lanes[MODEL].queue.num_running == 0
    assert all(counts.num_held == 0 for counts in server.admission.counts.values())
    await server.http.aclose()


over_http = pytest.mark.asyncio(loop_scope="module")


@over_http
async def test_requests_per_minute(server: Server) -> None:
    for left in (2, 1, 0):
        answer = await server["rated"].completions.with_raw_response.create(**COMPLETION)
        assert answer.headers["x-ratelimit-limit-requests"] == "3"
        assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
    assert answer.headers["x-ratelimit-reset-requests"].startswith(("59", "1m0s", "60"))
    for _ in range(2):  # by the bucket, then at the door
        with pytest.raises(openai.RateLimitError) as caught:
            await server["rated"].completions.create(**COMPLETION)
        error = caught.value
        assert (error.code, error.type) == ("rate_limit_exceeded", "requests")
        assert 15 <= int(error.response.headers["retry-after"]) <= 20
        assert error.response.headers["x-ratelimit-remaining-requests"] == "0"
    await server["calm"].completions.create(**COMPLETION)


@over_http
async def test_tokens_per_minute_are_reserved_and_settled(server: Server) -> None:
    body = {**COMPLETION, "max_tokens": 36, "stop": None}
    answer = await server["metered"].completions.with_raw_response.create(**{**body, "max_tokens": 6})
    assert answer.headers["x-ratelimit-remaining-tokens"] in ("30", "31")
    with pytest.raises(openai.RateLimitError) as caught:  # as much as a whole minute's
        await server["metered"].completions.create(**body)
    assert caught.value.type == "tokens"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 16
    with pytest.raises(openai.BadRequestError):  # known to the engine only: nothing was used
        await server["metered"].completions.create(**{**COMPLETION, "prompt": [10**6], "max_tokens": 20})
    text = answer.parse().choices[0].text
    body = {**COMPLETION, "max_tokens": 24, "stop": text[1:4]}
    shorter = await server["metered"].completions.with_raw_response.create(**body)
    assert int(shorter.headers["x-ratelimit-remaining-tokens"]) <= 5
    used = shorter.parse().usage.total_tokens
    assert used < 15
    assert server.admission.rates._accounts["metered"].levels.tokens == pytest.approx(30 - used, abs=3)
    with pytest.raises(openai.UnprocessableEntityError) as never:
        await server["metered"].completions.create(**{**COMPLETION, "prompt": [5] * 41})
    assert (never.value.code, "retry-after" in never.value.response.headers) == ("tokens_exceed_budget", False)


@over_http
async def test_a_tenant_waits_in_its_own_queue_and_no_longer_than_that(server: Server) -> None:
    running = asyncio.create_task(server["narrow"].completions.create(**LONG))
    await until(lambda: server.engine.stats().num_running == 1)
    waiting = [asyncio.create_task(server["narrow"].completions.create(**COMPLETION)) for _ in range(2)]
    await until(lambda: server.flow("narrow").num_waiting == 2)
    with pytest.raises(openai.RateLimitError) as caught:
        await server["narrow"].completions.create(**COMPLETION)
    assert caught.value.code == "concurrency_limit_exceeded"
    assert server.engine.stats().num_waiting == 0
    other = {**COMPLETION, "model": OTHER}  # which has a queue of its own
    assert (await server["narrow"].completions.create(**other)).usage.completion_tokens == 6
    assert (await server["calm"].completions.create(**COMPLETION)).usage.completion_tokens == 6
    assert not running.done()
    waiting[0].cancel()
    await asyncio.gather(waiting[0], return_exceptions=True)
    await until(lambda: server.flow("narrow").num_waiting == 1)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert (await waiting[1]).usage.completion_tokens == 6


@over_http
async def test_a_flood_waits_here_and_the_next_place_is_the_others(server: Server) -> None:
    body = {**LONG, "max_tokens": 24}
    flood = [asyncio.create_task(server["flood"].completions.create(**body)) for _ in range(40)]
    await until(lambda: server.flow("flood").num_waiting >= 30)
    assert server.engine.stats().num_waiting <= 4  # half a batch of eight
    assert (await server["calm"].completions.create(**COMPLETION)).usage.completion_tokens == 6
    assert sum(task.done() for task in flood) < 20
    answers = await asyncio.gather(*flood)
    assert {answer.usage.completion_tokens for answer in answers} == {24}


@over_http
async def test_a_client_says_how_long_it_waits(server: Server) -> None:
    flood = [asyncio.create_task(server["flood"].completions.create(**LONG)) for _ in range(4)]
    await until(lambda: server.engine.stats().num_running == 4)
    with pytest.raises(openai.InternalServerError) as caught:
        await server["calm"].completions.create(**COMPLETION, extra_headers={"x-max-wait-ms": "20"})
    assert (caught.value.status_code, caught.value.code) == (503, "queue_timeout")
    assert int(caught.value.response.headers["retry-after"]) >= 1
    with pytest.raises(openai.BadRequestError):
        await server["calm"].completions.create(**COMPLETION, extra_headers={"x-max-wait-ms": "soon"})
    for task in flood:
        task.cancel()
    await asyncio.gather(*flood, return_exceptions=True)


@over_http
async def test_a_queue_that_cannot_be_served_in_time_is_shed_early(server: Server) -> None:
    """``calm`` promises a second; far more than a second of work waits already, so more than half is refused."""
    lane = server.admission.lanes[MODEL]
    body = {**LONG, "max_tokens": 120}
    waiting = [asyncio.create_task(server["calm"].completions.create(**body)) for _ in range(60)]
    await until(lambda: lane.drain("calm").wait_s(server.flow("calm").waiting_cost) is not None)
    await until(lambda: (lane.drain("calm").wait_s(server.flow("calm").waiting_cost) or 0) > 2.5)
    with pytest.raises(openai.InternalServerError) as caught:
        await server["calm"].completions.create(**COMPLETION)
    assert (caught.value.status_code, caught.value.code) == (503, "shed")
    assert int(caught.value.response.headers["retry-after"]) >= 2
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    page = await server.http.get("/metrics", headers={"authorization": "Bearer admin"})
    families = {family.name: family for family in text_string_to_metric_families(page.text)}
    refused = families["brownoutserve_admission_refused_requests"].samples
    assert [(s.labels["outcome"], s.value) for s in refused if s.labels["tenant"] == "calm"] == [("shed", 1.0)]
    assert json.dumps(sorted(families)).count("admission") >= 8


def test_levels_without_a_limit_mean_nothing() -> None:
    assert full(Rates()) == Levels(0.0, 0.0)
