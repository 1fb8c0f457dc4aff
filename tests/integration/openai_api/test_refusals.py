"""What the API refuses: by field, by size, by number; each in OpenAI's form."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from cluster.ingress.lingering import LINGER_BYTES
from tests.integration.openai_api.calls import CHAT, COMPLETION, MAX_BODY_BYTES, MAX_REQUESTS, post
from tests.integration.served_api import MODEL

pytestmark = pytest.mark.asyncio(loop_scope="module")


REFUSALS: list[tuple[str, Any, int, str | None]] = [
    ("completions", {**COMPLETION, "model": "other"}, 404, "model"),
    ("completions", {**COMPLETION, "model": 5}, 400, "model"),
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
    ("chat/completions", {**CHAT, "tool_choice": "always"}, 400, "tool_choice"),
    ("chat/completions", {**CHAT, "tool_choice": {"type": "function"}}, 400, "tool_choice.function"),
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
    assert num_sent <= MAX_BODY_BYTES + LINGER_BYTES + 4096


async def test_more_requests_than_the_ingress_holds_are_refused_as_busy(client: httpx.AsyncClient) -> None:
    bodies = [{**COMPLETION, "max_tokens": 100, "ignore_eos": True}] * (MAX_REQUESTS + 8)
    responses = await asyncio.gather(*(post(client, "completions", body) for body in bodies))
    statuses = [response.status_code for response in responses]
    assert statuses.count(200) == MAX_REQUESTS and statuses.count(503) == 8
    refused = next(response for response in responses if response.status_code == 503)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "overloaded_error"
    assert (await post(client, "completions", COMPLETION)).status_code == 200  # every place was given back
