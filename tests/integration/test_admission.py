"""Tenants' queues, refusals and their headers, over HTTP and a real engine."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from cluster.admission.config import AdmissionSection
from cluster.admission.key_store import FileKeyStore
from cluster.admission.key_watch import KeyWatch
from cluster.admission.keys import new_key
from cluster.admission.rates import TenantRates
from cluster.admission.tenants import TenantLimits
from cluster.ingress.admission import Admission
from cluster.ingress.auth import Authenticator
from cluster.ingress.config import IngressSection
from cluster.ingress.routes import create_api
from cluster.ingress.service import OpenAIService, ServedModel
from engine.async_engine import AsyncEngine
from engine.types import GenerationRequest, RequestOutput
from tests.integration.in_process_backend import InProcessBackend
from tests.integration.served_api import MODEL, engine_config
from tests.models import write_config
from tests.waiting import until_async

pytestmark = pytest.mark.asyncio(loop_scope="module")

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


class Backend(InProcessBackend):
    """A LONG request lasts until its client leaves: on a busy machine it would else have ended, once the test gets
    round to what it does meanwhile.
    """

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestOutput, None]:
        async with aclosing(super().generate(request)) as outputs:
            async for output in outputs:
                if output.finished and request.sampling.max_tokens == LONG["max_tokens"]:
                    await asyncio.Event().wait()
                yield output


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
        models = [ServedModel(name, Backend(engine), engine.tokenizer) for name in (MODEL, OTHER)]
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
    await until_async(lambda: engine.stats().num_running == 0)
    await until_async(lambda: server.admission.lanes[MODEL].queue.num_running == 0)
    await until_async(lambda: all(counts.num_held == 0 for counts in server.admission.counts.values()))
    await server.http.aclose()


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the rates stands still: nothing flows into the buckets."""
    monkeypatch.setattr("cluster.admission.rates.time", SimpleNamespace(monotonic=lambda: 1000.0))


@pytest.mark.usefixtures("frozen")
async def test_requests_per_minute(server: Server) -> None:
    for left in (2, 1, 0):
        answer = await server["rated"].completions.with_raw_response.create(**COMPLETION)
        assert answer.headers["x-ratelimit-limit-requests"] == "3"
        assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
    assert seconds(answer.headers["x-ratelimit-reset-requests"]) == 60
    for _ in range(2):  # by the bucket, then at the door
        with pytest.raises(openai.RateLimitError) as caught:
            await server["rated"].completions.create(**COMPLETION)
        error = caught.value
        assert (error.code, error.type) == ("rate_limit_exceeded", "requests")
        assert error.response.headers["retry-after"] == "20"
        assert error.response.headers["x-ratelimit-remaining-requests"] == "0"
    await server["calm"].completions.create(**COMPLETION)


def seconds(duration: str) -> float:
    """Of "1m0s", "59.5s" or "250ms"."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)(ms|[hms])", duration))


@pytest.mark.usefixtures("frozen")
async def test_tokens_per_minute_are_reserved_and_settled(server: Server) -> None:
    body = {**COMPLETION, "max_tokens": 36, "stop": None}
    answer = await server["metered"].completions.with_raw_response.create(**{**body, "max_tokens": 6})
    assert answer.headers["x-ratelimit-remaining-tokens"] == "30"
    with pytest.raises(openai.RateLimitError) as caught:  # as much as a whole minute's
        await server["metered"].completions.create(**body)
    assert caught.value.type == "tokens"
    assert caught.value.response.headers["retry-after"] == "15"  # for ten tokens
    with pytest.raises(openai.BadRequestError):  # known to the engine only: nothing was used
        await server["metered"].completions.create(**{**COMPLETION, "prompt": [10**6], "max_tokens": 20})
    text = answer.parse().choices[0].text
    body = {**COMPLETION, "max_tokens": 24, "stop": text[1:4]}
    shorter = await server["metered"].completions.with_raw_response.create(**body)
    assert shorter.headers["x-ratelimit-remaining-tokens"] == "2"
    used = shorter.parse().usage.total_tokens
    assert used < 15
    assert server.admission.rates._accounts["metered"].levels.tokens == pytest.approx(30 - used)
    with pytest.raises(openai.UnprocessableEntityError) as never:
        await server["metered"].completions.create(**{**COMPLETION, "prompt": [5] * 41})
    assert (never.value.code, "retry-after" in never.value.response.headers) == ("tokens_exceed_budget", False)


async def test_a_tenant_waits_in_its_own_queue_and_no_longer_than_that(server: Server) -> None:
    running = asyncio.create_task(server["narrow"].completions.create(**LONG))
    await until_async(lambda: server.flow("narrow").num_running == 1)
    waiting = [asyncio.create_task(server["narrow"].completions.create(**COMPLETION)) for _ in range(2)]
    await until_async(lambda: server.flow("narrow").num_waiting == 2)
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
    await until_async(lambda: server.flow("narrow").num_waiting == 1)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert (await waiting[1]).usage.completion_tokens == 6


async def test_a_flood_waits_here_and_the_next_place_is_the_others(server: Server) -> None:
    body = {**LONG, "max_tokens": 100}
    flood = [asyncio.create_task(server["flood"].completions.create(**body)) for _ in range(40)]
    await until_async(lambda: server.flow("flood").num_waiting >= 24)
    assert server.engine.stats().num_waiting <= 4  # half a batch of eight
    assert (await server["calm"].completions.create(**COMPLETION)).usage.completion_tokens == 6
    assert sum(task.done() for task in flood) < 20
    for task in flood[16:]:
        task.cancel()
    answers = await asyncio.gather(*flood[:16])  # some of these were waiting
    assert {answer.usage.completion_tokens for answer in answers} == {100}
    await asyncio.gather(*flood[16:], return_exceptions=True)


async def test_a_client_says_how_long_it_waits(server: Server) -> None:
    flood = [asyncio.create_task(server["flood"].completions.create(**LONG)) for _ in range(4)]
    await until_async(lambda: server.flow("flood").num_running == 4)
    with pytest.raises(openai.InternalServerError) as caught:
        await server["calm"].completions.create(**COMPLETION, extra_headers={"x-max-wait-ms": "20"})
    assert (caught.value.status_code, caught.value.code) == (503, "queue_timeout")
    assert int(caught.value.response.headers["retry-after"]) >= 1
    with pytest.raises(openai.BadRequestError):
        await server["calm"].completions.create(**COMPLETION, extra_headers={"x-max-wait-ms": "soon"})
    for task in flood:
        task.cancel()
    await asyncio.gather(*flood, return_exceptions=True)


async def test_a_queue_that_cannot_be_served_in_time_is_shed_early(server: Server) -> None:
    """``calm`` promises a second; far more than a second of work waits already, so more than half is refused."""
    lane = server.admission.lanes[MODEL]
    body = {**LONG, "max_tokens": 120}
    waiting = [asyncio.create_task(server["calm"].completions.create(**body)) for _ in range(200)]
    await until_async(lambda: (lane.drain("calm").wait_s(server.flow("calm").waiting_cost) or 0) > 2.5)
    with pytest.raises(openai.InternalServerError) as caught:
        await server["calm"].completions.create(**COMPLETION)
    assert (caught.value.status_code, caught.value.code) == (503, "shed")
    assert int(caught.value.response.headers["retry-after"]) >= 2
    for task in waiting:
        task.cancel()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    num_shed = 1 + sum(isinstance(outcome, openai.InternalServerError) for outcome in outcomes)  # the last ones, maybe
    page = await server.http.get("/metrics", headers={"authorization": "Bearer admin"})
    families = {family.name: family for family in text_string_to_metric_families(page.text)}
    refused = families["brownoutserve_admission_refused_requests"].samples
    assert [(s.labels["outcome"], s.value) for s in refused if s.labels["tenant"] == "calm"] == [("shed", num_shed)]
    assert json.dumps(sorted(families)).count("admission") >= 8
