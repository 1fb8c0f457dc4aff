"""JSON and tool calls from a model with random weights: the grammar alone makes them valid."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import openai
import pytest

from cluster.ingress.config import IngressSection
from tests.integration.served_api import CONTEXT_TOKENS, MODEL, engine_config, serve
from tests.models import write_config

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Bern", "Oslo", "Rome"]},
        "celsius": {"type": "integer", "minimum": -40, "maximum": 50},
        "windy": {"type": "boolean"},
    },
    "required": ["city", "celsius", "windy"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}
REPORT = {"type": "function", "function": {"name": "report", "parameters": SCHEMA}}
STOP = {
    "type": "function",
    "function": {"name": "stop", "parameters": {"type": "object", "additionalProperties": False}},
}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "How is the weather?"}], "max_tokens": 200}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    path = write_config(tmp_path_factory.mktemp("models") / MODEL, max_position_embeddings=CONTEXT_TOKENS)
    with serve(engine_config(path), IngressSection()) as served:
        yield openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)


def check_weather(text: str) -> None:
    weather = json.loads(text)
    assert list(weather) == ["city", "celsius", "windy"]
    assert weather["city"] in ("Bern", "Oslo", "Rome")
    assert -40 <= weather["celsius"] <= 50 and isinstance(weather["windy"], bool)


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"temperature": 1, "seed": 1}, {"temperature": 2, "top_p": 0.9}]
)
def test_json_schema(api: openai.OpenAI, sampling: dict[str, float]) -> None:
    answer = api.chat.completions.create(**CHAT, **sampling, n=3, response_format=FORMAT)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        check_weather(choice.message.content)


def test_json_object(api: openai.OpenAI) -> None:
    """Random weights may go on for ever; a bias for closing marks ends the object in time."""
    closing = {str(token_id): 20 for token_id in range(4096) if token_id in (93, 92, 34)}
    answer = api.chat.completions.create(
        **CHAT, temperature=0, response_format={"type": "json_object"}, logit_bias=closing
    )
    text = answer.choices[0].message.content
    assert text.lstrip().startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_streamed_json_equals_the_whole(api: openai.OpenAI) -> None:
    whole = api.chat.completions.create(**CHAT, temperature=0, response_format=FORMAT)
    stream = api.chat.completions.create(**CHAT, temperature=0, response_format=FORMAT, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    check_weather(text)
    assert text == whole.choices[0].message.content


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "report"}}])
def test_tool_calls_whole_and_streamed(api: openai.OpenAI, choice: object) -> None:
    body = {**CHAT, "temperature": 0, "tools": [REPORT, STOP], "tool_choice": choice, "parallel_tool_calls": False}
    answer = api.chat.completions.create(**body).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    (call,) = answer.message.tool_calls
    assert call.function.name in (("report", "stop") if choice == "required" else ("report",))
    if call.function.name == "report":
        check_weather(call.function.arguments)

    name, arguments, ids, reasons = "", "", set(), []
    for chunk in api.chat.completions.create(**body, stream=True):
        part = chunk.choices[0]
        assert not part.delta.content
        reasons.append(part.finish_reason)
        for delta in part.delta.tool_calls or ():
            assert delta.index == 0
            ids.add(delta.id)
            name += delta.function.name or ""
            arguments += delta.function.arguments or ""
    assert (name, arguments) == (call.function.name, call.function.arguments)
    assert reasons[-1] == "tool_calls" and set(reasons[:-1]) == {None}
    assert len(ids - {None}) == 1


def test_tools_change_the_prompt_unless_none_may_be_called(api: openai.OpenAI) -> None:
    def num_prompt_tokens(**fields: object) -> int:
        return api.chat.completions.create(**{**CHAT, "max_tokens": 1}, **fields).usage.prompt_tokens

    plain = num_prompt_tokens()
    assert num_prompt_tokens(tools=[REPORT], tool_choice="none") == plain
    assert num_prompt_tokens(tools=[REPORT]) > plain + 50


def test_a_conversation_with_calls_and_results_goes_on(api: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "report", "arguments": '{"city": "Bern"}'}}
    messages = [
        *CHAT["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "done"},
    ]
    answer = api.chat.completions.create(**{**CHAT, "messages": messages, "max_tokens": 4}, tools=[REPORT])
    assert answer.usage.completion_tokens == 4
    call["function"]["arguments"] = "no JSON"
    with pytest.raises(openai.BadRequestError) as refused:
        api.chat.completions.create(**{**CHAT, "messages": messages, "max_tokens": 4})
    assert refused.value.body["param"] == "messages"


CITY = ["Bern", "größe 😀"]
FORMS: dict[str, tuple[object, str]] = {  # vLLM's name |-> (constraint, regular expression of what it lets through)
    "json": ({"type": "object", "properties": {"hot": {"type": "boolean"}}}, r'\{\s*("hot"\s*:\s*(true|false)\s*)?\}'),
    "regex": ("[0-9]{3}-[a-f]{2}", "[0-9]{3}-[a-f]{2}"),
    "choice": (CITY, "|".join(CITY)),
    "grammar": ('root ::= "select " [a-z] ("," [a-z])? ";"', "select [a-z](,[a-z])?;"),
}


@pytest.mark.parametrize("kind", FORMS)
def test_vllms_fields(api: openai.OpenAI, kind: str) -> None:
    """In chats, in completions, streamed, and under the names that older vLLM servers read."""
    constraint, pattern = FORMS[kind]
    new, old = {"structured_outputs": {kind: constraint}}, {f"guided_{kind}": constraint}
    sampling = {"temperature": 1, "seed": 3}
    chat = api.chat.completions.create(**CHAT, **sampling, extra_body=new).choices[0]
    stream = api.chat.completions.create(**CHAT, **sampling, extra_body=old, stream=True)
    prompt = {"model": MODEL, "prompt": "How is the weather?", "max_tokens": 200}
    text = api.completions.create(**prompt, **sampling, extra_body=new).choices[0]
    assert (chat.finish_reason, text.finish_reason) == ("stop", "stop")
    assert re.fullmatch(pattern, chat.message.content) and re.fullmatch(pattern, text.text)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == chat.message.content


@pytest.mark.parametrize("form", [{"regex": "(a"}, {"grammar": "start: x"}, {"json": {"type": "x"}}, {}])
def test_a_form_that_cannot_be_followed(api: openai.OpenAI, form: dict[str, object]) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        api.chat.completions.create(**CHAT, extra_body={"structured_outputs": form})
    assert refused.value.body["param"] == ".".join(("structured_outputs", *form))
    assert refused.value.body["type"] == "invalid_request_error"


UNKNOWN_TOKEN = "start: <|no_such_token|>"  # which only shows beside a vocabulary, in the engine


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"structured_outputs": {"grammar": UNKNOWN_TOKEN}}, "structured_outputs.grammar"),
        ({"guided_grammar": UNKNOWN_TOKEN}, "guided_grammar"),
    ],
)
def test_a_form_that_the_vocabulary_cannot_follow(
    api: openai.OpenAI, asked: dict[str, object], param: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        api.chat.completions.create(**CHAT, stream=stream, extra_body=asked)
    assert refused.value.body["param"] == param
    assert refused.value.body["message"].startswith(param)


def test_the_clients_own_parsing_of_structured_output(api: openai.OpenAI) -> None:
    """`parse` sends the schema that the client makes of a class and gives back an object of it."""
    from typing import Literal

    from pydantic import BaseModel

    class Weather(BaseModel):
        city: Literal["Bern", "Oslo"]
        windy: bool

    answer = api.chat.completions.parse(**CHAT, temperature=0, response_format=Weather)
    assert answer.choices[0].message.parsed.city in ("Bern", "Oslo")
