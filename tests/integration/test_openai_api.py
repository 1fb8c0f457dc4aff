"""The OpenAI API over a real engine in this process: answers, refusals and their fields. Ray comes in tests/e2e."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from cluster.config import IngressSection
from cluster.ingress.routes import create_api
from cluster.ingress.service import OpenAIService, ServedModel
from engine.async_engine import AsyncEngine
from engine.config import BrownoutConfig, CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from engine.types import BrownoutSetting
from tests.integration.in_process_backend import InProcessBackend
from tests.models import write_config

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "tiny"
CONTEXT_TOKENS = 128
MAX_BODY_BYTES = 16 * 1024
COMPLETION = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AsyncEngine]:
    path = write_config(tmp_path_factory.mktemp("models") / MODEL)
    engine = await AsyncEngine.start(
        EngineConfig(
            model=ModelConfig(str(path), load_format="random", max_model_len=CONTEXT_TOKENS),
            cache=CacheConfig(num_blocks=128),
            scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64),
            brownout=BrownoutConfig(ways=(2,), exempt_first=0, exempt_last=0, allow_unmeasured=True, profile_repeats=0),
            num_threads=1,
            stream_interval_s=0,
        )
    )
    yield engine
    await engine.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(engine: AsyncEngine) -> AsyncIterator[httpx.AsyncClient]:
    config = IngressSection(max_body_bytes=MAX_BODY_BYTES, max_concurrent=16)
    service = OpenAIService([ServedModel(MODEL, InProcessBackend(engine), engine.tokenizer)], config, "ingress")
    transport = httpx.ASGITransport(create_api(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(client: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=client, max_retries=0)


async def post(client: httpx.AsyncClient, path: str, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await client.post(f"/v1/{path}", content=content, headers=headers)


async def test_models(api: openai.AsyncOpenAI) -> None:
    listed = await api.models.list()
    assert [model.id for model in listed.data] == [MODEL]
    assert (await api.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError):
        await api.models.retrieve("other")


async def test_completion_equals_the_engine_and_counts_tokens(api: openai.AsyncOpenAI, engine: AsyncEngine) -> None:
    answer = await api.completions.create(**COMPLETION)
    prompt_tokens = len(engine.tokenizer.encode(COMPLETION["prompt"]))
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt_tokens, 8)
    assert answer.usage.total_tokens == prompt_tokens + 8
    assert answer.id.startswith("cmpl-")


async def test_streamed_completion_equals_the_whole_one(api: openai.AsyncOpenAI) -> None:
    whole = await api.completions.create(**COMPLETION, logprobs=2)
    stream = await api.completions.create(**COMPLETION, logprobs=2, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    *parts, last = chunks
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert last.choices == [] and last.usage.completion_tokens == 8
    assert all(part.usage is None for part in parts)
    assert parts[-1].choices[0].finish_reason == "length"
    assert all(part.choices[0].finish_reason is None for part in parts[:-1])
    streamed = [part.choices[0].logprobs for part in parts]
    for name in ("tokens", "token_logprobs", "text_offset"):
        joined = [value for logprobs in streamed for value in getattr(logprobs, name)]
        assert joined == getattr(whole.choices[0].logprobs, name)


async def test_streamed_chat_equals_the_whole_one(api: openai.AsyncOpenAI) -> None:
    whole = await api.chat.completions.create(**CHAT)
    stream = await api.chat.completions.create(**CHAT, stream=True)
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


async def test_chat_logprobs(api: openai.AsyncOpenAI) -> None:
    answer = await api.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == 8
    for token in content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token  # greedy: the chosen one is the best
        assert bytes(token.bytes).decode("utf-8", errors="replace") == token.token
    assert "".join(token.token for token in content) == answer.choices[0].message.content


async def test_completion_logprobs(api: openai.AsyncOpenAI) -> None:
    answer = await api.completions.create(**COMPLETION, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 8
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == logprob == max(top.values())
    assert logprobs.text_offset[:2] == [0, len(logprobs.tokens[0])]


async def test_chat_without_a_limit_fills_the_context(api: openai.AsyncOpenAI) -> None:
    body = {name: value for name, value in CHAT.items() if name != "max_tokens"}
    answer = await api.chat.completions.create(**body, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == CONTEXT_TOKENS
    assert answer.choices[0].finish_reason == "length"


async def test_completion_without_a_limit_gets_16_tokens(api: openai.AsyncOpenAI) -> None:
    answer = await api.completions.create(model=MODEL, prompt="Hi", temperature=0, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16


async def test_stop_string_ends_the_answer_before_it(api: openai.AsyncOpenAI) -> None:
    text = (await api.completions.create(**COMPLETION)).choices[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    answer = await api.completions.create(**COMPLETION, stop=[stop])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == text[: text.index(stop)]


async def test_seed_repeats_an_answer(api: openai.AsyncOpenAI) -> None:
    sampled = {**COMPLETION, "temperature": 1.0}
    first, again, other = [(await api.completions.create(**sampled, seed=seed)).choices[0].text for seed in (7, 7, 8)]
    assert first == again != other


async def test_several_prompts_and_choices_keep_their_order(api: openai.AsyncOpenAI) -> None:
    prompts = ["Once upon a time", "Hello"]
    alone = [(await api.completions.create(**{**COMPLETION, "prompt": prompt})).choices[0].text for prompt in prompts]
    answer = await api.completions.create(**{**COMPLETION, "prompt": prompts}, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [alone[0], alone[0], alone[1], alone[1]]
    assert answer.usage.completion_tokens == 32

    stream = await api.completions.create(**{**COMPLETION, "prompt": prompts}, n=2, stream=True)
    texts = [""] * 4
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in answer.choices]


async def test_choices_of_one_seed_differ(api: openai.AsyncOpenAI) -> None:
    answer = await api.completions.create(**{**COMPLETION, "temperature": 1.0}, n=3, seed=1)
    assert len({choice.text for choice in answer.choices}) == 3
    prompt_tokens = (await api.completions.create(**COMPLETION)).usage.prompt_tokens
    assert answer.usage.prompt_tokens == prompt_tokens  # a prompt counts once


async def test_prompt_as_token_ids_and_echo(api: openai.AsyncOpenAI, engine: AsyncEngine) -> None:
    plain = await api.completions.create(**COMPLETION)
    ids = engine.tokenizer.encode(COMPLETION["prompt"])
    echoed = await api.completions.create(**{**COMPLETION, "prompt": ids}, echo=True)
    assert echoed.choices[0].text == COMPLETION["prompt"] + plain.choices[0].text


async def test_content_parts_are_joined(api: openai.AsyncOpenAI) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    joined = await api.chat.completions.create(**{**CHAT, "messages": [{"role": "user", "content": parts}]})
    assert joined.choices[0].message.content == (await api.chat.completions.create(**CHAT)).choices[0].message.content


async def test_unknown_fields_are_accepted(client: httpx.AsyncClient) -> None:
    response = await post(client, "completions", {**COMPLETION, "user": "me", "best_friend": [1]})
    assert response.status_code == 200


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
    for full in (full_by_header, full_by_body, full_by_loss):
        assert full.json()["usage"]["brownout"]["dimmed_pairs"] == 0


REFUSALS: list[tuple[str, Any, int, str | None]] = [
    ("completions", {**COMPLETION, "model": "other"}, 404, "model"),
    ("completions", {name: COMPLETION[name] for name in ("prompt", "max_tokens")}, 400, "model"),
    ("completions", b'{"model": ', 400, None),
    ("completions", b"", 400, None),
    ("completions", b"[1, 2]", 400, None),
    ("completions", b"\xff\xfe", 400, None),
    ("completions", b"[" * 10_000, 400, None),
    ("completions", b'{"model": "tiny", "prompt": "\\ud800"}', 400, None),
    ("completions", {"model": MODEL}, 400, "prompt"),
    ("completions", {**COMPLETION, "prompt": ""}, 400, "prompt"),
    ("completions", {**COMPLETION, "prompt": []}, 400, "prompt"),
    ("completions", {**COMPLETION, "prompt": ["a", ""]}, 400, "prompt"),
    ("completions", {**COMPLETION, "prompt": 5}, 400, "prompt"),
    ("completions", {**COMPLETION, "prompt": [1, -1]}, 400, "prompt"),
    ("completions", {**COMPLETION, "prompt": [10**9]}, 400, "prompt"),
    ("completions", {**COMPLETION, "prompt": [1, True]}, 400, "prompt"),
    ("completions", {**COMPLETION, "prompt": "word " * 500}, 400, "prompt"),
    ("completions", {**COMPLETION, "max_tokens": -1}, 400, "max_tokens"),
    ("completions", {**COMPLETION, "max_tokens": 0}, 400, "max_tokens"),
    ("completions", {**COMPLETION, "max_tokens": 10**12}, 400, "max_tokens"),
    ("completions", {**COMPLETION, "max_tokens": "8"}, 400, "max_tokens"),
    ("completions", {**COMPLETION, "max_tokens": 1.5}, 400, "max_tokens"),
    ("completions", {**COMPLETION, "min_tokens": 9}, 400, "min_tokens"),
    ("completions", {**COMPLETION, "temperature": -0.1}, 400, "temperature"),
    ("completions", {**COMPLETION, "temperature": 2.1}, 400, "temperature"),
    ("completions", {**COMPLETION, "temperature": "hot"}, 400, "temperature"),
    ("completions", b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400, "temperature"),
    ("completions", {**COMPLETION, "top_p": 0}, 400, "top_p"),
    ("completions", {**COMPLETION, "top_k": -2}, 400, "top_k"),
    ("completions", {**COMPLETION, "n": 0}, 400, "n"),
    ("completions", {**COMPLETION, "n": 10_000}, 400, "n"),
    ("completions", {**COMPLETION, "stop": 5}, 400, "stop"),
    ("completions", {**COMPLETION, "stop": ["a", 1]}, 400, "stop"),
    ("completions", {**COMPLETION, "stop": ""}, 400, "stop"),
    ("completions", {**COMPLETION, "stop": ["x"] * 17}, 400, "stop"),
    ("completions", {**COMPLETION, "logit_bias": {"a": 1}}, 400, "logit_bias"),
    ("completions", {**COMPLETION, "logit_bias": {"-1": 1}}, 400, "logit_bias"),
    ("completions", {**COMPLETION, "logit_bias": {"5": 101}}, 400, "logit_bias"),
    ("completions", {**COMPLETION, "logit_bias": {"99999": 1}}, 400, "logit_bias"),
    ("completions", {**COMPLETION, "logit_bias": [1]}, 400, "logit_bias"),
    ("completions", {**COMPLETION, "logprobs": 21}, 400, "logprobs"),
    ("completions", {**COMPLETION, "service_tier": "gold"}, 400, "service_tier"),
    ("completions", {**COMPLETION, "priority": 2**40}, 400, "priority"),
    ("completions", {**COMPLETION, "seed": 2**64}, 400, "seed"),
    ("completions", {**COMPLETION, "stream": "yes"}, 400, "stream"),
    ("completions", {**COMPLETION, "brownout": {"class": "half"}}, 400, "brownout.class"),
    ("completions", {**COMPLETION, "brownout": {"max_loss": -1}}, 400, "brownout.max_loss"),
    ("completions", {**COMPLETION, "prompt": "x" * MAX_BODY_BYTES}, 413, None),
    ("chat/completions", {"model": MODEL}, 400, "messages"),
    ("chat/completions", {**CHAT, "messages": []}, 400, "messages"),
    ("chat/completions", {**CHAT, "messages": "hi"}, 400, "messages"),
    ("chat/completions", {**CHAT, "messages": [{"content": "hi"}]}, 400, "messages.0.role"),
    ("chat/completions", {**CHAT, "messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content"),
    (
        "chat/completions",
        {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        400,
        "messages.0.content",
    ),
    ("chat/completions", {**CHAT, "messages": [{"role": "user", "content": "word " * 500}]}, 400, "messages"),
    ("chat/completions", {**CHAT, "top_logprobs": 2}, 400, "top_logprobs"),
    ("chat/completions", {**CHAT, "max_tokens": None, "max_completion_tokens": 0}, 400, "max_completion_tokens"),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), REFUSALS)
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_input_is_refused_by_field(
    client: httpx.AsyncClient, path: str, body: Any, status: int, param: str | None, stream: bool
) -> None:
    if stream and isinstance(body, dict) and "stream" not in body:
        body = {**body, "stream": True}
    response = await post(client, path, body)
    error = response.json()["error"]
    assert response.status_code == status, error
    assert error["param"] == param, error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert param is None or param.split(".")[-1] in error["message"]


async def test_unknown_class_header_is_refused(client: httpx.AsyncClient) -> None:
    response = await post(client, "completions", COMPLETION, **{"x-brownout-class": "gold"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "x-brownout-class")


async def test_unknown_route_and_method_are_json(client: httpx.AsyncClient) -> None:
    for response, status in ((await client.get("/v2"), 404), (await client.get("/v1/completions"), 405)):
        assert response.status_code == status
        assert response.json()["error"]["message"]


async def test_an_endless_body_is_refused_at_its_limit(client: httpx.AsyncClient) -> None:
    num_sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal num_sent
        while True:
            num_sent += 1024
            yield b" " * 1024

    response = await client.post("/v1/completions", content=chunks())
    assert response.status_code == 413
    assert num_sent <= MAX_BODY_BYTES + 2048


async def test_more_requests_than_the_ingress_holds_are_refused_as_busy(client: httpx.AsyncClient) -> None:
    bodies = [{**COMPLETION, "max_tokens": 64, "ignore_eos": True}] * 24
    responses = await asyncio.gather(*(post(client, "completions", body) for body in bodies))
    statuses = [response.status_code for response in responses]
    assert statuses.count(200) == 16 and statuses.count(503) == 8
    refused = next(response for response in responses if response.status_code == 503)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "overloaded_error"
    assert (await post(client, "completions", COMPLETION)).status_code == 200  # every place was given back


async def test_metrics_and_health(client: httpx.AsyncClient) -> None:
    await post(client, "completions", COMPLETION)
    assert (await client.get("/health")).json() == {"status": "ok"}
    assert (await client.get("/ready")).json() == {"status": "ok", "replicas": 1}
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
