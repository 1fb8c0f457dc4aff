"""Answers, whole and streamed, equal each other and what was asked for."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

from engine.async_engine import AsyncEngine
from tests.integration.openai_api.calls import CHAT, COMPLETION, CONTEXT_TOKENS, post
from tests.integration.served_api import MODEL

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_models(api: openai.AsyncOpenAI) -> None:
    listed = await api.models.list()
    assert [model.id for model in listed.data] == [MODEL]
    assert (await api.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError):
        await api.models.retrieve("other")


async def test_without_a_name_the_first_model_answers(client: httpx.AsyncClient) -> None:
    body = {name: value for name, value in COMPLETION.items() if name != "model"}
    answer = await post(client, "completions", body)
    assert (answer.status_code, answer.json()["model"]) == (200, MODEL)


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
