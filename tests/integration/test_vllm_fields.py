"""What vLLM's users send beyond OpenAI's API, and what they read in its answers, over a real engine and real HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from cluster.ingress.config import IngressSection
from engine.text.tokenizer import Tokenizer
from tests.integration.served_api import MODEL, ServedApi, engine_config, serve
from tests.models import write_config
from tests.waiting import until

COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedApi]:
    path = write_config(tmp_path_factory.mktemp("models") / MODEL)
    with serve(engine_config(path, context_tokens=128), IngressSection()) as served:
        yield served


@pytest.fixture(scope="module")
def tokenizer(served: ServedApi) -> Tokenizer:
    return served.engine.tokenizer


@pytest.fixture(scope="module")
def api(served: ServedApi) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)


def test_allowed_tokens_are_the_only_ones(api: openai.OpenAI, tokenizer: Tokenizer) -> None:
    allowed = [tokenizer.encode(word)[0] for word in ("yes", "no")]
    for sampling in ({"temperature": 0}, {"temperature": 2, "seed": 1}, {"temperature": 1, "top_p": 0.5, "seed": 2}):
        body = {**COMPLETION, **sampling, "extra_body": {"allowed_token_ids": allowed, "return_token_ids": True}}
        assert set(api.completions.create(**body).choices[0].token_ids) <= set(allowed)


def test_token_ids_stand_beside_the_text(api: openai.OpenAI, tokenizer: Tokenizer) -> None:
    asked = {"return_token_ids": True}
    text = api.completions.create(**COMPLETION, n=2, extra_body=asked)
    for choice in text.choices:
        assert choice.prompt_token_ids == tokenizer.encode(COMPLETION["prompt"])
        assert tokenizer.decode(choice.token_ids) == choice.text
    chunks = [chunk.choices[0] for chunk in api.completions.create(**COMPLETION, stream=True, extra_body=asked)]
    assert chunks[0].prompt_token_ids == text.choices[0].prompt_token_ids
    assert not any("prompt_token_ids" in chunk.model_extra for chunk in chunks[1:])
    assert [token_id for chunk in chunks for token_id in chunk.token_ids] == text.choices[0].token_ids
    chat = api.chat.completions.create(**CHAT, temperature=0, extra_body=asked)
    assert len(chat.prompt_token_ids) == chat.usage.prompt_tokens
    assert len(chat.choices[0].token_ids) == chat.usage.completion_tokens
    events = list(api.chat.completions.create(**CHAT, temperature=0, stream=True, extra_body=asked))
    assert events[0].prompt_token_ids == chat.prompt_token_ids
    streamed = [token_id for event in events for token_id in event.choices[0].token_ids]
    assert streamed == chat.choices[0].token_ids
    assert "token_ids" not in api.completions.create(**COMPLETION).choices[0].model_extra


def test_logprobs_name_tokens_by_id(api: openai.OpenAI) -> None:
    asked = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    plain = api.completions.create(**COMPLETION, logprobs=2).choices[0].logprobs
    choice = api.completions.create(**COMPLETION, logprobs=2, extra_body=asked).choices[0]
    names = [f"token_id:{token_id}" for token_id in choice.token_ids]
    assert choice.logprobs.tokens == names
    assert all(name in top for name, top in zip(names, choice.logprobs.top_logprobs, strict=True))
    assert choice.logprobs.text_offset == plain.text_offset
    chat = api.chat.completions.create(**CHAT, temperature=0, logprobs=True, top_logprobs=1, extra_body=asked)
    content = chat.choices[0].logprobs.content
    assert [token.token for token in content] == [f"token_id:{token_id}" for token_id in chat.choices[0].token_ids]


def test_logprobs_of_the_prompt(api: openai.OpenAI, tokenizer: Tokenizer) -> None:
    asked = {"prompt_logprobs": 2, "return_token_ids": True}
    echo = api.completions.create(**COMPLETION, echo=True, logprobs=2).choices[0].logprobs
    choice = api.completions.create(**COMPLETION, extra_body=asked).choices[0]
    assert choice.logprobs is None
    first, *others = choice.prompt_logprobs
    assert first is None and len(others) == len(choice.prompt_token_ids) - 1
    for token_id, logprob, found in zip(choice.prompt_token_ids[1:], echo.token_logprobs[1:], others, strict=False):
        own = found[str(token_id)]
        assert own["logprob"] == pytest.approx(logprob, abs=1e-4)
        assert own["decoded_token"] == tokenizer.token_text(token_id)
        assert {entry["rank"] for entry in found.values()} == {1, 2, own["rank"]}
        better = [entry for entry in found.values() if entry["logprob"] > own["logprob"]]
        assert own["rank"] > len(better) if own["rank"] > 2 else own["rank"] == len(better) + 1
    chat = api.chat.completions.create(**CHAT, extra_body=asked)
    assert len(chat.prompt_logprobs) == len(chat.prompt_token_ids)
    with pytest.raises(openai.BadRequestError, match="not streamed"):
        api.chat.completions.create(**CHAT, stream=True, extra_body=asked)


@pytest.mark.parametrize("stream", [False, True])
def test_what_an_answer_stopped_at(api: openai.OpenAI, stream: bool) -> None:
    whole = api.completions.create(**COMPLETION, extra_body={"return_token_ids": True}).choices[0]
    by_token = {"stop_token_ids": [whole.token_ids[2]]}
    stops = [({}, None), ({"stop": whole.text[2:4]}, whole.text[2:4]), ({"extra_body": by_token}, whole.token_ids[2])]
    for asked, reason in stops:
        answer = api.completions.create(**COMPLETION, **asked, stream=stream)
        last = list(answer)[-1] if stream else answer
        assert last.choices[0].stop_reason == reason
        assert last.choices[0].finish_reason == ("length" if reason is None else "stop")


def test_special_tokens_are_text_if_asked_for(api: openai.OpenAI, tokenizer: Tokenizer) -> None:
    special = next(iter(tokenizer.eos_token_ids))
    forced = {"allowed_token_ids": [special], "ignore_eos": True}
    assert api.completions.create(**COMPLETION, extra_body=forced).choices[0].text == ""
    shown = api.completions.create(**COMPLETION, extra_body={**forced, "skip_special_tokens": False})
    assert shown.choices[0].text == 8 * tokenizer.token_text(special) != ""


def test_a_prompt_is_truncated_from_its_beginning(api: openai.OpenAI, tokenizer: Tokenizer) -> None:
    prompt = "word " * 200 + "the end"
    ids = tokenizer.encode(prompt)
    for asked, kept in ((5, 5), (-1, 120), (1000, None)):
        body = {**COMPLETION, "prompt": prompt}
        extra = {"truncate_prompt_tokens": asked, "return_token_ids": True}
        if kept is None:
            with pytest.raises(openai.BadRequestError) as refused:
                api.completions.create(**body, extra_body=extra)
            assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")
            continue
        assert api.completions.create(**body, extra_body=extra).choices[0].prompt_token_ids == ids[-kept:]
    echo = api.completions.create(**COMPLETION, echo=True, extra_body={"truncate_prompt_tokens": 2})
    assert echo.choices[0].text.startswith(tokenizer.decode(tokenizer.encode(COMPLETION["prompt"])[-2:]))


def test_an_answer_goes_on_where_the_last_message_ends(api: openai.OpenAI, tokenizer: Tokenizer) -> None:
    messages = [*CHAT["messages"], {"role": "assistant", "content": "Dear reader, "}]
    extra = {"continue_final_message": True, "return_token_ids": True}
    answer = api.chat.completions.create(**{**CHAT, "messages": messages}, extra_body=extra)
    prompt = tokenizer.decode(answer.prompt_token_ids, skip_special_tokens=False)
    assert prompt.endswith("assistant\nDear reader, ")
    with pytest.raises(openai.BadRequestError) as both:
        api.chat.completions.create(**CHAT, extra_body={**extra, "add_generation_prompt": True})
    assert both.value.param == "continue_final_message"
    counted = httpx.post(
        f"{str(api.base_url).removesuffix('v1/')}tokenize",
        json={"messages": messages, "continue_final_message": True},
        timeout=60,
    )
    assert counted.json()["tokens"] == answer.prompt_token_ids


@pytest.mark.parametrize(
    "body",
    [
        {"allowed_token_ids": []},
        {"allowed_token_ids": [10**6]},
        {"allowed_token_ids": [1], "guided_regex": "a"},
        {"prompt_logprobs": 21},
        {"prompt_logprobs": -1},
        {"truncate_prompt_tokens": 0},
        {"truncate_prompt_tokens": -2},
        {"cache_salt": ""},
    ],
)
def test_values_that_cannot_be(api: openai.OpenAI, body: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        api.completions.create(**COMPLETION, extra_body=body)
    assert refused.value.param == next(iter(body))


def test_operators_routes(served: ServedApi) -> None:
    for method, path in (("GET", "/ping"), ("POST", "/ping"), ("HEAD", "/health"), ("HEAD", "/ready")):
        assert httpx.request(method, served.url + path, timeout=60).status_code == 200
    until(lambda: httpx.get(f"{served.url}/load", timeout=60).json() == {"server_load": 0})
    assert set(httpx.get(f"{served.url}/version", timeout=60).json()) == {"version"}
    refused = httpx.post(f"{served.url}/v1/brownout", timeout=60)
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET, PUT")
