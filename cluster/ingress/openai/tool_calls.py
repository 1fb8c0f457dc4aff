"""Finds tool calls in an answer's text as it arrives: <tool_call>{"name": ..., "arguments": {...}}</tool_call>. Pure.

A call's arguments are passed on piece by piece as soon as its name is known. What only looks like a call is text.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from cluster.ingress.openai.grammars import CALL_BEGIN, CALL_END

HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')


@dataclass(slots=True)
class ToolCall:
    index: int
    call_id: str
    name: str
    arguments: str = ""  # JSON text


@dataclass(frozen=True, slots=True)
class Found:
    """What a piece of text turned out to be: text for the reader, and pieces of calls.

    A delta's first piece has the call's id and name.
    """

    text: str = ""
    deltas: tuple[dict[str, Any], ...] = ()


class _State(Enum):
    TEXT = auto()  # outside of calls
    CALL = auto()  # after <tool_call>, its name not known yet
    ARGUMENTS = auto()
    TAIL = auto()  # after the arguments, up to </tool_call>


@dataclass(slots=True)
class ToolCallParser:
    calls: list[ToolCall] = field(default_factory=list)
    _state: _State = _State.TEXT
    _held: str = ""  # not passed on yet
    _depth: int = 0
    _in_string: bool = False
    _escaped: bool = False

    def feed(self, text: str, last: bool) -> Found:
        """What is certain now; with ``last`` all that was held back."""
        self._held += text
        shown: list[str] = []
        deltas: list[dict[str, Any]] = []
        while self._advance(shown, deltas):
            pass
        if last and self._state in (_State.TEXT, _State.CALL):
            self._finish(shown, deltas)
        return Found("".join(shown), tuple(deltas))

    def _advance(self, shown: list[str], deltas: list[dict[str, Any]]) -> bool:
        """Take one step; False when nothing more can be known."""
        match self._state:
            case _State.TEXT:
                return self._pass_text(shown)
            case _State.CALL:
                return self._begin_call(shown, deltas)
            case _State.ARGUMENTS:
                return self._pass_arguments(deltas)
            case _State.TAIL:
                return self._end_call()

    def _pass_text(self, shown: list[str]) -> bool:
        before, mark, after = self._held.partition(CALL_BEGIN)
        if mark:
            shown.append(before.rstrip() if before.strip() else "")
            self._held, self._state = after, _State.CALL
            return True
        num_held = _num_held_back(before)
        shown.append(before[: len(before) - num_held])
        self._held = before[len(before) - num_held :]
        return False

    def _begin_call(self, shown: list[str], deltas: list[dict[str, Any]]) -> bool:
        if head := HEAD.match(self._held):
            self._add_call(json.loads(head[1]), deltas)
            self._held, self._state = self._held[head.end() :], _State.ARGUMENTS
            return True
        inside, mark, after = self._held.partition(CALL_END)
        if not mark:
            return False
        if not self._take_whole(inside, deltas):
            shown.append(CALL_BEGIN + inside + CALL_END)
        self._held, self._state = after, _State.TEXT
        return True

    def _take_whole(self, inside: str, deltas: list[dict[str, Any]]) -> bool:
        """A call in another order of keys, known only when it is complete."""
        try:
            call = json.loads(inside)
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, TypeError, KeyError, AttributeError):
            return False
        if not isinstance(name, str):
            return False
        self._add_call(name, deltas)
        self._add_arguments(arguments if isinstance(arguments, str) else json.dumps(arguments), deltas)
        return True

    def _pass_arguments(self, deltas: list[dict[str, Any]]) -> bool:
        end = self._scan(self._held)
        self._add_arguments(self._held[:end], deltas)
        self._held = self._held[end:]
        if self._depth:
            return False
        self._state = _State.TAIL
        return True

    def _end_call(self) -> bool:
        _, mark, after = self._held.partition(CALL_END)
        if mark:
            self._held, self._state = after, _State.TEXT
        return bool(mark)

    def _finish(self, shown: list[str], deltas: list[dict[str, Any]]) -> None:
        held, self._held = self._held, ""
        if self._state is _State.CALL and not self._take_whole(held, deltas):
            shown.append(CALL_BEGIN + held)
        elif self._state is _State.TEXT and (held.strip() or not self.calls):
            shown.append(held)

    def _scan(self, text: str) -> int:
        """Where in ``text`` the JSON object ends that has been open since earlier pieces."""
        for place, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return place + 1
        return len(text)

    def _add_call(self, name: str, deltas: list[dict[str, Any]]) -> None:
        call = ToolCall(len(self.calls), f"call_{secrets.token_hex(12)}", name)
        self.calls.append(call)
        function = {"name": name, "arguments": ""}
        deltas.append({"index": call.index, "id": call.call_id, "type": "function", "function": function})

    def _add_arguments(self, text: str, deltas: list[dict[str, Any]]) -> None:
        if text:
            self.calls[-1].arguments += text
            deltas.append({"index": self.calls[-1].index, "function": {"arguments": text}})


def _num_held_back(text: str) -> int:
    """Length of the tail that a call's beginning, and the blanks before it, could still follow."""
    for length in range(min(len(text), len(CALL_BEGIN) - 1), 0, -1):
        if text.endswith(CALL_BEGIN[:length]):
            break
    else:
        length = 0
    rest = text[: len(text) - length]
    return length + len(rest) - len(rest.rstrip())
