"""LangChain's OpenAI classes against the API: an agent's framework, with parameters of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

from cluster.ingress.config import IngressSection
from tests.integration.served_api import CONTEXT_TOKENS, MODEL, ServedApi, engine_config, serve
from tests.models import write_config

MESSAGES = [SystemMessage("Be brief."), HumanMessage("Hello")]


class Weather(BaseModel):
    """How the weather is."""

    city: Literal["Bern", "Oslo"]
    windy: bool


@tool
def look(direction: Literal["north", "south"]) -> str:
    """Look into a direction."""
    return f"nothing in the {direction}"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedApi]:
    path = write_config(tmp_path_factory.mktemp("models") / MODEL, max_position_embeddings=CONTEXT_TOKENS)
    with serve(engine_config(path), IngressSection()) as served:
        yield served


@pytest.fixture(scope="module")
def chat(served: ServedApi) -> ChatOpenAI:
    url = f"{served.url}/v1"
    return ChatOpenAI(base_url=url, api_key="none", model=MODEL, temperature=0, max_tokens=96, max_retries=0)


def test_invoke_and_stream(chat: ChatOpenAI) -> None:
    answer = chat.invoke(MESSAGES)
    assert isinstance(answer, AIMessage) and answer.content
    assert answer.usage_metadata["output_tokens"] == 96 and answer.response_metadata["finish_reason"] == "length"
    parts = list(chat.stream(MESSAGES, stream_usage=True))
    assert "".join(part.content for part in parts) == answer.content
    assert sum(part.usage_metadata["output_tokens"] for part in parts if part.usage_metadata) == 96


def test_logprobs_and_stop(chat: ChatOpenAI) -> None:
    text = chat.invoke(MESSAGES).content
    stopped = chat.bind(stop=[text[5:8]]).invoke(MESSAGES)
    assert stopped.content == text[: text.index(text[5:8])]
    scored = chat.bind(logprobs=True, top_logprobs=2).invoke(MESSAGES)
    assert len(scored.response_metadata["logprobs"]["content"]) == 96


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat: ChatOpenAI, method: str) -> None:
    answer = chat.with_structured_output(Weather, method=method).invoke(MESSAGES)
    assert isinstance(answer, Weather)


@pytest.mark.parametrize("choice", ["any", "look"])
def test_a_tool_is_called_and_its_result_taken(chat: ChatOpenAI, choice: str) -> None:
    bound = chat.bind_tools([look], tool_choice=choice, parallel_tool_calls=False)
    asked = bound.invoke(MESSAGES)
    (call,) = asked.tool_calls
    assert call["name"] == "look" and call["args"]["direction"] in ("north", "south")
    gathered = None
    for part in bound.stream(MESSAGES):
        gathered = part if gathered is None else gathered + part
    assert gathered.tool_calls[0]["args"] == call["args"]
    result = ToolMessage(look.invoke(call["args"]), tool_call_id=call["id"])
    assert chat.bind_tools([look], tool_choice="none").invoke([*MESSAGES, asked, result]).content


async def test_batches_and_completions(served: ServedApi, chat: ChatOpenAI) -> None:
    answers = await chat.abatch([MESSAGES] * 3)
    assert len({answer.content for answer in answers}) == 1
    completion = OpenAI(base_url=f"{served.url}/v1", api_key="none", model=MODEL, temperature=0, max_tokens=8)
    result = completion.generate(["Once upon a time", "Hello"])
    assert [len(choices) for choices in result.generations] == [1, 1]
    assert result.llm_output["token_usage"]["completion_tokens"] == 16
