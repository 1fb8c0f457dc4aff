"""What an answer's form is made of: response_format and tools as one grammar of llguidance, or none. Pure.

| asked for                                    | grammar                                               |
|----------------------------------------------|-------------------------------------------------------|
| nothing, or only tools that are not strict   | none: free text                                       |
| response_format json_object, json_schema     | JSON, by its schema                                   |
| tool_choice required                         | one or more calls of any tool                         |
| tool_choice with a name                      | one call of that tool                                 |
| tools of which some are strict               | free text; a call that begins follows its schema      |
| response_format and tools                    | JSON by its schema, or calls                          |

A call is what Hermes and Qwen models are trained to write: <tool_call>, a JSON object, </tool_call>.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

from llguidance import LLMatcher, StructTag

from cluster.ingress.chat_schemas import ChatBody, JsonObjectFormat, JsonSchemaFormat, Tool
from cluster.ingress.errors import ApiError, Outcome

CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"
# Bounded: models that are unsure may else write spaces for ever.
ANSWER_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,16}"
CALL_WHITESPACE = r"\x20"  # as the models are trained to write calls
DATA_KEYWORDS = {"const", "enum", "default", "examples"}  # what they hold is no schema
OPEN_KEYWORDS = {"additionalProperties", "patternProperties", "unevaluatedProperties", "anyOf", "oneOf", "$ref"}
NO_PARAMETERS = {"type": "object", "properties": {}}


def chat_grammar(body: ChatBody) -> str | None:
    """Raises ApiError (invalid) that names the parameter with a schema that cannot be followed."""
    required, offered = body.required_tools, body.offered_tools
    schema = _answer_schema(body)
    for tool in offered:
        _check(_call_schema(tool), f"tools: the parameters of {tool.function.name}", "tools")
    if required:
        return LLMatcher.grammar_from_lark("start: calls\n" + _calls_lark(required, _many(body)))
    if schema is not None:
        _check(schema, "response_format", "response_format")
        if not offered:
            return LLMatcher.grammar_from_json_schema(json.dumps(schema))
        either = f"start: calls | answer\nanswer: %json {json.dumps(schema)}\n"
        return LLMatcher.grammar_from_lark(either + _calls_lark(offered, _many(body)))
    if any(tool.function.strict for tool in offered):
        bodies = f"start: body\n{_bodies_lark(offered)}"
        tag = StructTag(trigger=CALL_BEGIN, begin=f"{CALL_BEGIN}\n", grammar=bodies, end=f"\n{CALL_END}")
        return LLMatcher.grammar_from_lark(StructTag.to_grammar([tag], assume_special=False))
    return None


def _many(body: ChatBody) -> bool:
    return body.tool_choice in (None, "auto", "required") and body.parallel_tool_calls is not False


def _calls_lark(tools: Sequence[Tool], many: bool) -> str:
    calls = 'calls: call ("\\n" call)*' if many else "calls: call"
    call = f'call: "{CALL_BEGIN}\\n" body "\\n{CALL_END}"'
    return f"{calls}\n{call}\n{_bodies_lark(tools)}"


def _bodies_lark(tools: Sequence[Tool]) -> str:
    """Rule ``body``: what stands between the marks, one rule for each tool."""
    rules = ["body: " + " | ".join(f"body_{number}" for number in range(len(tools)))]
    rules += [f"body_{number}: %json {json.dumps(_call_schema(tool))}" for number, tool in enumerate(tools)]
    return "\n".join(rules) + "\n"


def _call_schema(tool: Tool) -> dict[str, Any]:
    """Of the object between the marks; the name comes first, so that it can be streamed before the arguments."""
    function = tool.function
    parameters = _closed(function.parameters or NO_PARAMETERS)
    schema = {
        "type": "object",
        "properties": {"name": {"const": function.name}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
    return schema | _definitions(parameters) | _options(bool(function.strict), CALL_WHITESPACE)


def _definitions(schema: dict[str, Any]) -> dict[str, Any]:
    """What references in ``schema`` point to; they start at the root, so there it must be."""
    return {key: schema[key] for key in ("$defs", "definitions") if key in schema}


def _answer_schema(body: ChatBody) -> dict[str, Any] | None:
    match body.response_format:
        case JsonObjectFormat():
            return {"type": "object"} | _options(True, ANSWER_WHITESPACE)
        case JsonSchemaFormat(json_schema=wanted):
            return _closed(wanted.schema_) | _options(bool(wanted.strict), ANSWER_WHITESPACE)
        case _:
            return None


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """``schema`` with objects that hold the properties they list and no others, unless they say otherwise.

    Left to itself a model may add properties for ever. With allOf, parts list different properties of one object.
    """
    return schema if '"allOf":' in json.dumps(schema) else cast(dict[str, Any], _close(schema))


def _close(part: Any) -> Any:
    if isinstance(part, list):
        return [_close(item) for item in part]
    if not isinstance(part, dict):
        return part
    closed = {key: value if key in DATA_KEYWORDS else _close(value) for key, value in part.items()}
    if isinstance(part.get("properties"), dict) and "type" in part and not OPEN_KEYWORDS & part.keys():
        closed["additionalProperties"] = False
    return closed


def _options(strict: bool, whitespace: str) -> dict[str, Any]:
    """Of the library: a schema that is not strict may use keywords that it cannot enforce."""
    return {"x-guidance": {"whitespace_pattern": whitespace, "lenient": not strict}}


def _check(schema: dict[str, Any], what: str, param: str) -> None:
    mistake = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    if mistake and not mistake.startswith("WARNING"):
        raise ApiError(Outcome.INVALID, f"{what}: the schema cannot be followed: {mistake.splitlines()[0]}", param)
