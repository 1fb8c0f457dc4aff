"""What the grammars of response_format and tools let through, tried with whole answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from cluster.ingress.errors import ApiError
from cluster.ingress.openai.chat_schemas import ChatBody
from cluster.ingress.openai.grammars import answer_grammar
from cluster.ingress.openai.schemas import parse_body
from tests.models import DEMO_MODEL

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
POINT = {
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/coordinate"}},
    "required": ["x"],
    "additionalProperties": False,
    "$defs": {"coordinate": {"type": "integer"}},
}
LOOK = {"type": "function", "function": {"name": "look", "parameters": POINT}}
WAIT = {"type": "function", "function": {"name": "wait"}}
STRICT = {"type": "function", "function": {**LOOK["function"], "strict": True}}  # type: ignore[dict-item]
# The same name for another definition.
NAMED = {**POINT, "$defs": {"coordinate": {"type": "string"}}}
NAME = {"type": "function", "function": {"name": "name", "parameters": NAMED}}
JSON_POINT = {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT, "strict": True}}


def call(name: str, arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


LOOKING, WAITING = call("look", {"x": 3}), call("wait", {})


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return LLTokenizer((DEMO_MODEL / "tokenizer.json").read_text())


def grammar_of(**fields: Any) -> str | None:
    return answer_grammar(parse_body(ChatBody, json.dumps({**CHAT, **fields}).encode()))


@pytest.mark.parametrize(
    ("fields", "allowed", "refused"),
    [
        ({"response_format": {"type": "json_object"}}, ["{}", '{"a": [1, {"b": null}]}'], ["[]", "text", '{"a": }']),
        ({"response_format": JSON_POINT}, ['{"x": 3}', '{\n  "x":3\n}'], ['{"x": 1.5}', "{}", '{"x": 1, "y": 2}']),
        ({"tools": [LOOK, WAIT], "tool_choice": "required"}, [LOOKING, f"{WAITING}\n{LOOKING}"], ["text", ""]),
        (
            {"tools": [LOOK, WAIT], "tool_choice": "required", "parallel_tool_calls": False},
            [WAITING],
            [f"{WAITING}\n{LOOKING}"],
        ),
        (
            {"tools": [LOOK, WAIT], "tool_choice": {"type": "function", "function": {"name": "look"}}},
            [LOOKING],
            [WAITING, call("look", {"x": "3"}), f"{LOOKING}\n{LOOKING}"],
        ),
        ({"tools": [STRICT]}, ["free text", LOOKING, f"I look. {LOOKING}"], [call("look", {"x": "3"}), WAITING]),
        ({"tools": [STRICT, WAIT]}, [WAITING, LOOKING], [call("sleep", {})]),
        ({"tools": [STRICT, NAME]}, [LOOKING, call("name", {"x": "Bern"})], [call("name", {"x": 3})]),
        ({"tools": [WAIT], "response_format": JSON_POINT}, ['{"x": 3}', WAITING], ["text", LOOKING]),
        ({"tools": [LOOK], "tool_choice": "none", "response_format": JSON_POINT}, ['{"x": 3}'], [LOOKING]),
    ],
)
def test_answers(tokenizer: LLTokenizer, fields: dict[str, Any], allowed: list[str], refused: list[str]) -> None:
    grammar = grammar_of(**fields)
    assert grammar is not None
    for answers, wanted in ((allowed, True), (refused, False)):
        for answer in answers:
            matcher = LLMatcher(tokenizer, grammar)
            ids = tokenizer.tokenize_str(answer)
            assert not matcher.is_error(), matcher.get_error()
            assert (matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()) is wanted, answer


@pytest.mark.parametrize(
    "fields",
    [{}, {"response_format": {"type": "text"}}, {"tools": [LOOK]}, {"tools": [LOOK], "tool_choice": "none"}],
)
def test_free_text_has_no_grammar(fields: dict[str, Any]) -> None:
    assert grammar_of(**fields) is None


BAD_SCHEMA = {"type": "no such type"}
BAD_TOOL = {"type": "function", "function": {"name": "f", "parameters": BAD_SCHEMA}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": BAD_SCHEMA}}},
            "response_format",
        ),
        ({"tools": [BAD_TOOL]}, "tools"),
        ({"tools": [BAD_TOOL], "tool_choice": "required"}, "tools"),
        ({"tools": [LOOK, LOOK]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [LOOK], "tool_choice": {"type": "function", "function": {"name": "wait"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [LOOK], "tool_choice": {"type": "function", "function": {"name": 3}}}, "tool_choice.function.name"),
        ({"tools": [LOOK], "tool_choice": "any"}, "tool_choice"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refusal:
        grammar_of(**fields)
    assert refusal.value.outcome.status == 400
    assert refusal.value.param == param


@pytest.mark.parametrize(
    ("schema", "allows_more"),
    [
        ({"type": "object", "properties": {"a": {"type": "integer"}}}, False),
        ({"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": True}, True),
        ({"type": "object"}, True),
        (
            {
                "type": "object",
                "allOf": [{"properties": {"a": {"type": "integer"}}}, {"properties": {"b": {"type": "integer"}}}],
            },
            True,
        ),
    ],
)
def test_objects_hold_what_they_list(tokenizer: LLTokenizer, schema: dict[str, Any], allows_more: bool) -> None:
    grammar = grammar_of(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})
    assert grammar is not None
    for answer, wanted in (('{"a": 1}', True), ('{"a": 1, "b": 2}', allows_more)):
        matcher, ids = LLMatcher(tokenizer, grammar), tokenizer.tokenize_str(answer)
        assert (matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()) is wanted


def test_a_keyword_that_cannot_be_enforced_is_an_error_only_in_strict_schemas() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    for strict in (False, True):
        wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": strict}}
        if strict:
            with pytest.raises(ApiError, match="uniqueItems"):
                grammar_of(response_format=wanted)
        else:
            assert grammar_of(response_format=wanted)
