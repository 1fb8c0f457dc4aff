"""The openai client against a whole cluster."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import httpx
import openai
import pytest
import pytest_asyncio

from cluster.local.cluster import LocalCluster
from tests.e2e.conftest import ADMIN_TOKEN, CONTEXT_TOKENS, MODEL, Metrics, whole_metrics
from tests.e2e.test_faults import nothing_is_held
from tests.waiting import until

pytestmark = pytest.mark.cluster

NUM_TRIES = 5  # of what a busy machine may once spoil
COMPLETION = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 24, "temperature": 0}


@pytest_asyncio.fixture
async def api(cluster: LocalCluster) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=120) as api:
        yield api


async def streamed_text(api: openai.AsyncOpenAI, **body: object) -> str:
    stream = await api.completions.create(**{**COMPLETION, **body}, stream=True)
    return "".join([chunk.choices[0].text async for chunk in stream])


async def test_models_and_health(api: openai.AsyncOpenAI, cluster: LocalCluster) -> None:
    assert [model.id for model in (await api.models.list()).data] == [MODEL]
    assert httpx.get(f"{cluster.url}/health", timeout=60).json() == {"status": "ok"}
    ready = {"status": "ok", "replicas": 2, "models": {MODEL: 2}}  # of those that answer at once
    until(lambda: httpx.get(f"{cluster.url}/ready", timeout=60).json() == ready)


async def test_completion_streamed_and_whole(api: openai.AsyncOpenAI) -> None:
    whole = await api.completions.create(**COMPLETION)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 24
    assert whole.usage.model_extra["brownout"]["routed_pairs"] > 0
    assert await streamed_text(api) == whole.choices[0].text


async def test_chat_streamed_and_whole_with_usage(api: openai.AsyncOpenAI) -> None:
    whole = await api.chat.completions.create(**CHAT)
    stream = await api.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
    *parts, last = [chunk async for chunk in stream]
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage.total_tokens == whole.usage.total_tokens
    assert set(last.usage.model_extra["brownout"]) == {
        *("dimmed_share", "routed_pairs", "dimmed_pairs", "level_peak", "level_mean", "setting_version")
    }


async def test_logprobs_in_both_shapes(api: openai.AsyncOpenAI) -> None:
    chat = await api.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2)
    assert [len(token.top_logprobs) for token in chat.choices[0].logprobs.content] == [2] * 24
    completion = await api.completions.create(**COMPLETION, logprobs=2)
    assert len(completion.choices[0].logprobs.token_logprobs) == 24


async def test_stop_and_seed(api: openai.AsyncOpenAI) -> None:
    text = (await api.completions.create(**COMPLETION)).choices[0].text
    stopped = await api.completions.create(**COMPLETION, stop=text[5:8])
    assert (stopped.choices[0].finish_reason, stopped.choices[0].text) == ("stop", text[: text.index(text[5:8])])
    assert await streamed_text(api, temperature=1, seed=3) == await streamed_text(api, temperature=1, seed=3)


async def test_request_id_comes_back_once(cluster: LocalCluster) -> None:
    async with httpx.AsyncClient(timeout=60) as client:
        for body in (COMPLETION, {**COMPLETION, "max_tokens": -1}, {**COMPLETION, "stream": True}):
            response = await client.post(
                f"{cluster.url}/v1/completions", json=body, headers={"x-request-id": "trace-7"}
            )
            assert response.headers.get_list("x-request-id") == ["trace-7"]


async def test_bad_input_through_the_whole_path(api: openai.AsyncOpenAI, cluster: LocalCluster) -> None:
    with pytest.raises(openai.NotFoundError):
        await api.completions.create(**{**COMPLETION, "model": "other"})
    with pytest.raises(openai.BadRequestError) as caught:
        await api.completions.create(**{**COMPLETION, "max_tokens": 10**9}, stream=True)
    assert caught.value.body["param"] == "max_tokens"
    with pytest.raises(openai.BadRequestError) as caught:  # known to the engine only
        await api.completions.create(**{**COMPLETION, "prompt": [10**6]})
    assert caught.value.body["param"] == "prompt"
    url = f"{cluster.url}/v1/completions"
    for content, status in ((b"\xff", 400), (b"{", 400), (b" " * (5 * 1024 * 1024), 413)):
        response = httpx.post(url, content=content, timeout=60)
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


async def test_concurrent_streams_share_too_few_kv_blocks(api: openai.AsyncOpenAI, cluster: LocalCluster) -> None:
    """32 streams want more blocks than both replicas have: some are preempted, all get their own whole answer."""
    prompts = [f"Story number {number}:" for number in range(32)]
    body = {"max_tokens": 160, "extra_body": {"ignore_eos": True}}
    for _ in range(NUM_TRIES):
        before = whole_metrics(cluster.url)
        texts = await asyncio.gather(*(streamed_text(api, prompt=prompt, **body) for prompt in prompts))
        after = whole_metrics(cluster.url)
        by_replica = [
            after.total("engine_requests_total", replica=replica, outcome="finished")
            - before.total("engine_requests_total", replica=replica, outcome="finished")
            for replica in after.label_values("replica")
        ]
        assert sum(by_replica) == 32
        if min(by_replica) >= 8:
            break
    else:
        pytest.fail("the router does not spread them")  # a replica that once has no time to tell its load gets few
    assert after.total("preemptions_total") > before.total("preemptions_total")
    for number in (0, 13, 31):
        assert texts[number] == await streamed_text(api, prompt=prompts[number], **body)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_blocks(
    cluster: LocalCluster, read_metrics: Callable[[str], Metrics], stream: bool
) -> None:
    long = {**COMPLETION, "max_tokens": CONTEXT_TOKENS - 16, "ignore_eos": True, "stream": stream}

    async def leave() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            if stream:
                async with client.stream("POST", f"{cluster.url}/v1/completions", json=long) as response:
                    line = await anext(response.aiter_lines())
                    assert json.loads(line.removeprefix("data: "))["choices"][0]["finish_reason"] is None
            else:
                asking = asyncio.create_task(client.post(f"{cluster.url}/v1/completions", json=long))
                running = lambda: read_metrics(cluster.url).total("running_requests") == 1  # noqa: E731
                await asyncio.to_thread(until, lambda: asking.done() or running())
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)

    for _ in range(NUM_TRIES):
        before = whole_metrics(cluster.url)
        await leave()
        await asyncio.to_thread(until, lambda: nothing_is_held(read_metrics(cluster.url)))
        after = whole_metrics(cluster.url)

        def increase(name: str, before: Metrics = before, after: Metrics = after, **labels: str) -> float:
            return after.total(name, **labels) - before.total(name, **labels)

        if (
            increase("http_requests_total", endpoint="completions", outcome="disconnected") == 1
            and increase("engine_requests_total", outcome="finished") == 0
            and increase("tokens_total", phase="decode") < 0.9 * CONTEXT_TOKENS
        ):
            return
    pytest.fail("the engine computed on for nobody")  # once, we may only have been too slow to leave


async def test_brownout_is_read_and_pinned_over_http(api: openai.AsyncOpenAI, cluster: LocalCluster) -> None:
    url, admin = f"{cluster.url}/v1/brownout", {"authorization": f"Bearer {ADMIN_TOKEN}"}
    for headers in ({}, {"authorization": "Bearer guess"}):
        refused = httpx.put(url, json={"level": 1}, headers=headers, timeout=60)
        assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
    for body, param in (({"level": 99}, "level"), ({"law": "fuzzy"}, "law"), ({"level": -1}, "level")):
        refused = httpx.put(url, json=body, headers=admin, timeout=60)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), refused.text
    try:
        pinned = httpx.put(url, json={"level": 1}, headers=admin, timeout=60).json()
        assert (pinned["policy"]["law"], pinned["policy"]["level"]) == ("static", 1)

        def levels() -> set[int]:
            answers = [httpx.post(f"{cluster.url}/v1/completions", json=COMPLETION, timeout=60) for _ in range(4)]
            return {answer.json()["usage"]["brownout"]["level_peak"] for answer in answers}

        until(lambda: levels() == {1})
        assert httpx.get(url, timeout=60).json()["policy"] == pinned["policy"]
        assert cluster.controller.status()["policy"]["level"] == 1
    finally:
        back = httpx.put(url, json={"law": "auto"}, headers=admin, timeout=60)
        cluster.controller.set_policy("off")
    assert (back.json()["policy"]["law"], back.json()["policy"]["level"]) == ("static", 0)  # as deployed


async def test_structured_output_through_the_whole_path(api: openai.AsyncOpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    answer = await api.chat.completions.create(**{**CHAT, "max_tokens": 60}, response_format=wanted)
    assert json.loads(answer.choices[0].message.content)["a"] in (1, 2)


async def test_a_prompt_is_scored_through_the_whole_path(api: openai.AsyncOpenAI) -> None:
    answer = await api.completions.create(**{**COMPLETION, "max_tokens": 0}, echo=True, logprobs=1)
    logprobs = answer.choices[0].logprobs.token_logprobs
    assert logprobs[0] is None and all(logprob <= 0 for logprob in logprobs[1:])
    assert answer.usage.completion_tokens == 0
