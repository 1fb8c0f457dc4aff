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


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_logprobs_scores_the_prompt(api: openai.AsyncOpenAI, engine: AsyncEngine, stream: bool) -> None:
    """max_tokens 0 asks for nothing else; the tokens and their probabilities do not depend on what follows."""
    ids = engine.tokenizer.encode(COMPLETION["prompt"])
    found = []
    for max_tokens in (0, 3):
        body = {**COMPLETION, "prompt": [ids, [5]], "max_tokens": max_tokens, "echo": True, "logprobs": 2}
        answer = await api.completions.create(**body, stream=stream)
        choices = [c async for chunk in answer for c in chunk.choices] if stream else answer.choices
        scored = [[c for c in choices if c.index == index and c.logprobs] for index in (0, 1)]
        tokens = [[t for c in of_one for t in c.logprobs.tokens] for of_one in scored]
        assert [len(of_one) for of_one in tokens] == [len(ids) + max_tokens, 1 + max_tokens]
        assert "".join(tokens[0][: len(ids)]) == COMPLETION["prompt"]
        logprobs = [p for c in scored[0] for p in c.logprobs.token_logprobs]
        tops = [t for c in scored[0] for t in c.logprobs.top_logprobs]
        assert logprobs[0] is None and tops[0] is None
        for token, logprob, top in zip(tokens[0][1:], logprobs[1:], tops[1:], strict=True):
            assert top[token] == logprob <= 0
        assert choices[-1].finish_reason == "length"
        found.append(logprobs[: len(ids)])
        if not stream:
            assert answer.usage.completion_tokens == 2 * max_tokens
            assert answer.choices[0].text.startswith(COMPLETION["prompt"])
            assert (answer.choices[0].text == COMPLETION["prompt"]) is (max_tokens == 0)
    assert found[0] == pytest.approx(found[1], abs=1e-5)


async def test_choices_share_a_long_prompt(api: openai.AsyncOpenAI, engine: AsyncEngine) -> None:
    prompt = [7 + number for number in range(100)]
    before = engine.stats().num_tokens
    answer = await api.completions.create(**{**COMPLETION, "prompt": prompt, "max_tokens": 4}, n=4)
    assert len({choice.text for choice in answer.choices}) == 1
    assert answer.usage.prompt_tokens == 100
    assert engine.stats().num_tokens - before < 200  # 100 for the first, 4 each for the others' last block


async def test_continuous_usage(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = await post(client, "completions", {**COMPLETION, "stream": True, "stream_options": options})
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[-2:] == [8, 8]


async def test_priority_and_template_variables_are_taken(client: httpx.AsyncClient) -> None:
    body = {**CHAT, "priority": -3, "chat_template_kwargs": {"enable_thinking": False}, "add_generation_prompt": True}
    response = await post(client, "chat/completions", body)
    assert response.status_code == 200
    assert "x-ignored-fields" not in response.headers


async def test_content_parts_are_joined(api: openai.AsyncOpenAI) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    joined = await api.chat.completions.create(**{**CHAT, "messages": [{"role": "user", "content": parts}]})
    assert joined.choices[0].message.content == (await api.chat.completions.create(**CHAT)).choices[0].message.content


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
    ("chat/completions", {**CHAT, "response_format": {"type": "yaml"}}, 400, "response_format"),
    ("chat/completions", {**CHAT, "tools": [{"type": "function"}]}, 400, "tools.0.function"),
    ("chat/completions", {**CHAT, "tool_choice": "required"}, 400, "tool_choice"),
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


async def test_tokenize_and_detokenize(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
    prompt = "Grüße, 世界 🙂"
    answer = (await client.post("/tokenize", json={"prompt": prompt, "return_token_strs": True})).json()
    assert answer["tokens"] == engine.tokenizer.encode(prompt)
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), CONTEXT_TOKENS)
    assert len(answer["token_strs"]) == answer["count"]
    back = await client.post("/detokenize", json={"model": MODEL, "tokens": answer["tokens"]})
    assert back.json() == {"prompt": prompt}
    chat = await client.post("/tokenize", json={"model": MODEL, "messages": CHAT["messages"]})
    used = (await post(client, "chat/completions", CHAT)).json()["usage"]["prompt_tokens"]
    assert chat.json()["count"] == used


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, 400, "prompt"),
        ("/tokenize", {"prompt": ""}, 400, "prompt"),
        ("/tokenize", {"messages": [{"role": 5}]}, 400, "messages.0.role"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/detokenize", {"tokens": [10**6]}, 400, "tokens"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens"),
    ],
)
async def test_tokens_refused_by_field(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    response = await client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


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
