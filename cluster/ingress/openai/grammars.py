"""What an answer's form is made of: its form and the tools as one grammar of llguidance, or none. Pure.

| asked for                                    | grammar                                               |
|----------------------------------------------|-------------------------------------------------------|
| nothing, or only tools that are not strict   | none: free text                                       |
| a form (answer_forms.py)                     | text of that form                                     |
| tool_choice required                         | one or more calls of any tool                         |
| tool_choice with a name                      | one call of that tool                                 |
| tools of which some are strict               | free text; a call that begins follows its schema      |
| a form and tools                             | text of that form, or calls                           |

A call is what Hermes and Qwen models are trained to write: <tool_call>, a JSON object, </tool_call>.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, cast

from llguidance import LLMatcher, StructTag, grammar_from

from cluster.ingress.errors import ApiError, Outcome
from cluster.ingress.openai.answer_forms import Form, Tag, TagContent
from cluster.ingress.openai.chat_schemas import ChatBody, Tool
from cluster.ingress.openai.schemas import GenerationBody

CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"
# Bounded: models that are unsure may else write spaces for ever.
ANSWER_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,16}"
CALL_WHITESPACE = r"\x20"  # as the models are trained to write calls
DATA_KEYWORDS = {"const", "enum", "default", "examples"}  # what they hold is no schema
OPEN_KEYWORDS = {"additionalProperties", "patternProperties", "unevaluatedProperties", "anyOf", "oneOf", "$ref"}
MAX_MISTAKE_CHARACTERS = 300  # of the library's own words in an error
NO_PARAMETERS = {"type": "object", "properties": {}}


def answer_grammar(body: GenerationBody) -> str | None:
    """Raises ApiError (invalid) that names the parameter with a form that cannot be followed."""
    form = body.form
    formed = None if form is None else _form_grammar(form)
    if not isinstance(body, ChatBody):
        return formed
    required, offered = body.required_tools, body.offered_tools
    for tool in offered:
        what = f"tools: the parameters of {tool.function.name}: the schema"
        _check(LLMatcher.grammar_from_json_schema(json.dumps(_call_schema(tool))), what, "tools")
    if required:
        return LLMatcher.grammar_from_lark("start: calls\n" + _calls_lark(required, _many(body)))
    if formed is not None:
        return _either(_calls_lark(offered, _many(body)), formed) if offered else formed
    if any(tool.function.strict for tool in offered):
        bodies = f"start: body\n{_bodies_lark(offered)}"
        tag = StructTag(trigger=CALL_BEGIN, begin=f"{CALL_BEGIN}\n", grammar=bodies, end=f"\n{CALL_END}")
        return LLMatcher.grammar_from_lark(StructTag.to_grammar([tag], assume_special=False))
    return None


def grammar_param(body: GenerationBody) -> str:
    """The field that asks for the grammar of `answer_grammar`, for errors."""
    form = body.form
    return "tools" if form is None or (isinstance(body, ChatBody) and body.required_tools) else form.param


def _form_grammar(form: Form) -> str:
    """Raises ApiError."""
    what = "the schema" if form.kind == "json" else "it"
    try:
        grammar = _FORMS[form.kind](form)
    except (ValueError, RecursionError) as error:
        raise ApiError(Outcome.INVALID, f"{form.param}: {what} cannot be followed: {error}", form.param) from error
    _check(grammar, f"{form.param}: {what}", form.param)
    return grammar


def _json_grammar(form: Form) -> str:
    return LLMatcher.grammar_from_json_schema(json.dumps(_form_schema(form.value, form)))


def _form_schema(schema: dict[str, Any], form: Form) -> dict[str, Any]:
    return _closed(schema) | _options(form.strict, ANSWER_WHITESPACE if form.whitespace is None else form.whitespace)


def _choice_grammar(form: Form) -> str:
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in form.value)


def _lark(text: str) -> str:
    """Lark, from Lark or GBNF. Raises ValueError."""
    if text.lstrip().startswith("{"):  # which the library would take for another notation of its own
        raise ValueError("a grammar in Lark or GBNF does not begin with a brace")
    return grammar_from("grammar", text).lstrip()


def _tags_grammar(form: Form) -> str:
    triggers, tags = form.value.tags()
    return StructTag.to_grammar([_struct_tag(tag, triggers, form) for tag in tags], assume_special=False)


def _struct_tag(tag: Tag, triggers: Sequence[str], form: Form) -> StructTag:
    """Raises ValueError."""
    trigger = next((trigger for trigger in triggers if tag.begin.startswith(trigger)), None)
    if trigger is None:
        raise ValueError(f"the tag {tag.begin!r} begins with no trigger")
    match tag.content:
        case TagContent(type="json_schema", json_schema=dict() as schema):
            content: str | dict[str, Any] = _form_schema(schema, form)
        case TagContent(type="regex", pattern=str() as pattern):
            content = _regex_lark(pattern)
        case TagContent(type="grammar", grammar=str() as grammar):
            content = _lark(grammar)
        case _:
            raise ValueError(f"the content of {tag.begin!r} has a type but no {tag.content.type}")
    return StructTag(trigger=trigger, begin=tag.begin, grammar=content, end=tag.end)


def _regex_lark(pattern: str) -> str:
    lark: str = json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"][0]["lark_grammar"]
    return lark


_FORMS: dict[str, Callable[[Form], str]] = {
    "json": _json_grammar,
    "regex": lambda form: LLMatcher.grammar_from_regex(form.value),
    "choice": _choice_grammar,
    "grammar": lambda form: _lark(form.value),
    "tags": _tags_grammar,
}


def _either(calls_lark: str, formed: str) -> str:
    """Calls, or an answer that follows ``formed``, as one set of grammars that name each other."""
    parts = json.loads(formed)["grammars"] if formed.startswith("{") else [{"lark_grammar": formed}]
    first = {"name": "main", "lark_grammar": f"start: calls | @answer\n{calls_lark}"}
    return json.dumps({"grammars": [first, {**parts[0], "name": "answer"}, *parts[1:]]})


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


def _check(grammar: str, what: str, param: str) -> None:
    mistake = LLMatcher.validate_grammar(grammar)
    if mistake and not mistake.startswith("WARNING"):
        raise ApiError(Outcome.INVALID, f"{what} cannot be followed: {_shown(mistake)}", param)


def _shown(mistake: str) -> str:
    """Its first lines, without the source and the marks below it."""
    lines = [line.strip() for line in mistake.splitlines() if "|" not in line and line.strip(" ^")]
    return " ".join(lines)[:MAX_MISTAKE_CHARACTERS]
