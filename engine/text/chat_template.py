"""Conversations to prompts: a checkpoint's own Jinja program, sandboxed, and tools for those that know none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Word for word what Qwen2.5's template and Hermes' tell their models.
TOOLS_TEXT = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{tools}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
    'XML tags:\n<tool_call>\n{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)

Message = Mapping[str, Any]


class ChatTemplate:
    """One compiled template. Raises jinja2.TemplateError, TypeError or AttributeError for what is none."""

    def __init__(self, source: str) -> None:
        environment = _environment()
        self._template = environment.from_string(source)
        self._knows_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
    ) -> str:
        """The prompt. A template that knows no tools gets them, and calls made before, as text of messages."""
        if not self._knows_tools:
            messages, tools = with_tools_as_text(messages, tools), ()
        return self._template.render(**{**variables, "messages": messages, "tools": list(tools) or None})


def with_tools_as_text(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Tools in the system message; calls in the assistant's, results in the user's, between Hermes' marks."""
    plain = [_without_tools(message) for message in messages]
    if not tools:
        return plain
    text = TOOLS_TEXT.format(tools="\n".join(map(_json, tools)))
    if plain and plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{text}"}, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def _without_tools(message: Message) -> Message:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if not message.get("tool_calls"):
        return message
    calls = [{key: call["function"][key] for key in ("name", "arguments")} for call in message["tool_calls"]]
    marked = [f"<tool_call>\n{_json(call)}\n</tool_call>" for call in calls]
    return {"role": message["role"], "content": "\n".join([*filter(None, [message["content"]]), *marked])}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _environment() -> ImmutableSandboxedEnvironment:
    """The Jinja dialect that chat templates are written in (transformers' ``apply_chat_template``)."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment
