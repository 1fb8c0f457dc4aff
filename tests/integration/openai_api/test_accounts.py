"""What is said about a request: how much it was dimmed, fields that nobody reads, log lines, metrics."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.ingress.config import IngressSection
from cluster.ingress.routes import create_api
from cluster.ingress.service import OpenAIService, ServedModel
from cluster.reports import ReplicaReport
from engine.async_engine import AsyncEngine
from engine.types import BrownoutSetting
from tests.integration.in_process_backend import InProcessBackend
from tests.integration.openai_api.calls import CHAT, COMPLETION, post
from tests.integration.served_api import MODEL

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_every_answer_says_how_much_it_was_dimmed(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
    peak = engine.info.num_levels - 1
    exact = (await post(client, "completions", COMPLETION)).json()["usage"]["brownout"]
    assert exact["dimmed_share"] == exact["dimmed_pairs"] == exact["level_peak"] == 0
    assert exact["routed_pairs"] > 0
    engine.apply_setting(BrownoutSetting.pinned(peak))
    try:
        long = {**COMPLETION, "prompt": "A different prompt " * 10}
        response = await post(client, "completions", long)
        dimmed = response.json()["usage"]["brownout"]
        full_by_header = await post(client, "completions", long, **{"x-brownout-class": "full"})
        full_by_body = await post(client, "completions", {**long, "brownout": {"class": "full"}})
        full_by_loss = await post(client, "completions", {**long, "brownout": {"max_loss": 0.5}})
    finally:
        engine.apply_setting(BrownoutSetting.pinned(0))
    assert dimmed["dimmed_share"] == dimmed["dimmed_pairs"] / dimmed["routed_pairs"] > 0
    assert dimmed["level_peak"] == peak and dimmed["level_mean"] > 0
    assert response.headers["x-brownout-level"] == str(peak)
    assert response.headers["x-brownout-share"] == f"{dimmed['dimmed_share']:.4f}"
    assert response.headers["x-brownout-setting"] == str(dimmed["setting_version"])
    for full in (full_by_header, full_by_body, full_by_loss):
        assert full.json()["usage"]["brownout"]["dimmed_pairs"] == 0


async def test_service_tier_is_a_class_and_comes_back(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
    engine.apply_setting(BrownoutSetting.pinned(engine.info.num_levels - 1))
    try:
        body = {**COMPLETION, "prompt": "Tiers of service " * 8}
        dimmed = {}
        for tier in (None, "default", "flex", "priority"):
            answer = (await post(client, "completions", {**body, "service_tier": tier})).json()
            assert answer.get("service_tier") == tier
            dimmed[tier] = answer["usage"]["brownout"]["dimmed_pairs"] > 0
    finally:
        engine.apply_setting(BrownoutSetting.pinned(0))
    assert dimmed == {None: True, "default": True, "flex": True, "priority": False}


async def test_unknown_fields_are_accepted_named_and_counted(client: httpx.AsyncClient) -> None:
    for stream in (False, True):
        body = {**COMPLETION, "user": "me", "best_friend": [1], "grüße": None, "stream": stream}
        response = await post(client, "completions", body)
        assert response.status_code == 200
        assert response.headers["x-ignored-fields"] == "best_friend, gr%C3%BC%C3%9Fe"
    assert "x-ignored-fields" not in (await post(client, "completions", {**COMPLETION, "user": "me"})).headers
    page = (await client.get("/metrics")).text
    counted = (
        'brownoutserve_http_unknown_fields_total{endpoint="completions",field="best_friend",ingress="ingress"} 2.0'
    )
    assert counted in page


async def test_names_that_clients_invent_do_not_fill_the_metrics(client: httpx.AsyncClient) -> None:
    await post(client, "chat/completions", {**CHAT, "max_tokens": 1, **{f"field{i}": 0 for i in range(300)}})
    page = (await client.get("/metrics")).text
    assert page.count("brownoutserve_http_unknown_fields_total{") <= 102
    assert 'field="other"' in page


async def test_one_log_line_for_each_request_without_its_text(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"x-request-id": "job-7", "traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    with caplog.at_level("INFO", logger="cluster"), caplog.at_level("INFO", logger="engine"):
        for body in (COMPLETION, {**COMPLETION, "stream": True}, {**COMPLETION, "max_tokens": -1}):
            await post(client, "completions", body, **headers)
    lines = [record.fields for record in caplog.records if record.message == "request"]
    assert [(line["outcome"], line["status"]) for line in lines] == [("ok", 200), ("ok", 200), ("invalid", 400)]
    for line in lines:
        assert (line["request_id"], line["trace_id"], line["endpoint"]) == ("job-7", trace, "completions")
        assert line["duration_ms"] >= line.get("ttft_ms", 0)
    assert [line["completion_tokens"] for line in lines[:2]] == [8, 8]
    of_engine = [record.fields for record in caplog.records if record.message == "finished"]
    assert [(line["trace_id"], line["completion_tokens"]) for line in of_engine] == [(trace, 8)] * 2
    assert all(line["request_id"].startswith("job-7-") for line in of_engine)
    assert COMPLETION["prompt"] not in str([record.__dict__ for record in caplog.records])


async def test_metrics_and_health(client: httpx.AsyncClient) -> None:
    await post(client, "completions", COMPLETION)
    assert (await client.get("/health")).json() == {"status": "ok"}
    assert (await client.get("/ready")).json() == {"status": "ok", "replicas": 1, "models": {MODEL: 1}}
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    samples = {(sample.name, *sorted(sample.labels.items())): sample.value for f in families for sample in f.samples}
    replica = (("model", MODEL), ("replica", "only"))
    for name in ("running_requests", "waiting_requests", "kv_used_blocks", "lease_expired"):
        assert samples["brownoutserve_" + name, *replica] == 0
    for name in ("kv_free_blocks", "steps_total", "routed_pairs_total", "setting_version"):
        assert ("brownoutserve_" + name, *replica) in samples
    assert samples["brownoutserve_tokens_total", ("model", MODEL), ("phase", "decode"), ("replica", "only")] > 0
    assert samples["brownoutserve_level", ("model", MODEL), ("phase", "decode"), ("replica", "only")] == 0
    answered = (("endpoint", "completions"), ("ingress", "ingress"), ("outcome", "ok"))
    assert samples["brownoutserve_http_requests_total", *answered] > 0
    assert samples["brownoutserve_http_requests_held", ("ingress", "ingress")] == 0


class Unheard(InProcessBackend):
    """Its engine has no time to report, and serves."""

    num_engines = 1

    async def reports(self) -> list[ReplicaReport]:
        return []

    def num_replicas(self) -> int:
        return self.num_engines


async def test_it_is_ready_while_requests_can_go_somewhere(engine: AsyncEngine) -> None:
    backend = Unheard(engine)
    service = OpenAIService([ServedModel(MODEL, backend, engine.tokenizer)], IngressSection(), "ingress")
    transport = httpx.ASGITransport(create_api(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for num_engines, status in ((1, 200), (0, 503)):
            backend.num_engines = num_engines
            response = await client.get("/ready")
            assert (response.status_code, response.json()["models"]) == (status, {MODEL: num_engines})
