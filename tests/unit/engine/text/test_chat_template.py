from __future__ import annotations

from typing import Any

import jinja2
import pytest

from engine.text.chat_template import CHATML_TEMPLATE, ChatTemplate

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"x": 3}}}
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "What is there?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "a cat", "tool_call_id": "1"},
]


def test_a_template_that_knows_tools_gets_them_as_they_are() -> None:
    template = ChatTemplate("{% for t in tools %}{{ t.function.name }}{% endfor %}|{{ messages[1].tool_calls[0].id }}")
    assert template.render(HISTORY, [TOOL], {}) == "look|1"


def test_a_template_that_asks_for_tools_gets_none_when_there_are_none() -> None:
    assert ChatTemplate("{{ 'yes' if tools is not none else 'no' }}").render(HISTORY, [], {}) == "no"


def test_a_template_without_tools_gets_them_as_text() -> None:
    prompt = ChatTemplate(CHATML_TEMPLATE).render(HISTORY, [TOOL], {"add_generation_prompt": True})
    system, user, assistant, result, end = prompt.split("<|im_start|>")[1:]
    assert system.startswith("system\n# Tools") and '{"type": "function", "function": {"name": "look"' in system
    assert user == "user\nWhat is there?<|im_end|>\n"
    assert assistant == ('assistant\n<tool_call>\n{"name": "look", "arguments": {"x": 3}}\n</tool_call><|im_end|>\n')
    assert result == "user\n<tool_response>\na cat\n</tool_response><|im_end|>\n"
    assert end == "assistant\n"


def test_tools_follow_a_system_message_of_the_conversation() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "{tools}"}]
    prompt = ChatTemplate(CHATML_TEMPLATE).render(messages, [TOOL], {})
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\n# Tools")
    assert prompt.count("system\n") == 1
    assert prompt.endswith("user\n{tools}<|im_end|>\n")


def test_further_variables_reach_the_template_but_replace_nothing_of_ours() -> None:
    template = ChatTemplate("{{ enable_thinking }} {{ messages | length }} {{ tools }}")
    assert template.render(HISTORY, [], {"enable_thinking": False, "messages": [], "tools": 1}) == "False 3 None"


def test_the_sandbox_holds() -> None:
    with pytest.raises(jinja2.exceptions.SecurityError):
        ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}").render([], [], {})
