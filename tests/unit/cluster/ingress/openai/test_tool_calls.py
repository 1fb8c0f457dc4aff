"""The parser finds the same calls and the same text however an answer is cut into pieces."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from typing import Any

import pytest

from cluster.ingress.openai.tool_calls import ToolCallParser

ONE = '<tool_call>\n{"name": "f", "arguments": {"a": "x}\\"<tool_call>", "b": [{"c": 1}]}}\n</tool_call>'
TWO = f'{ONE}\n<tool_call>\n{{"name": "g", "arguments": {{}}}}\n</tool_call>'
SWAPPED = '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>'
ARGUMENTS = {"a": 'x}"<tool_call>', "b": [{"c": 1}]}

# answer, its text, its calls
CASES: list[tuple[str, str, list[tuple[str, Any]]]] = [
    ("", "", []),
    ("plain text \n", "plain text \n", []),
    ("a < b, <tool> is no call", "a < b, <tool> is no call", []),
    (ONE, "", [("f", ARGUMENTS)]),
    (f"\n\n{ONE}\n", "", [("f", ARGUMENTS)]),
    (f"Let me see.\n{ONE}", "Let me see.", [("f", ARGUMENTS)]),
    (TWO, "", [("f", ARGUMENTS), ("g", {})]),
    (f"{ONE} and so on", " and so on", [("f", ARGUMENTS)]),
    (SWAPPED, "", [("f", {"a": 1})]),
    ("<tool_call>no JSON</tool_call> after", "<tool_call>no JSON</tool_call> after", []),
    ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
    ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', '<tool_call>{"name": 3, "arguments": {}}</tool_call>', []),
    ('<tool_call>{"name": "f"', '<tool_call>{"name": "f"', []),
    ('<tool_call>{"arguments": {}, "name": "f"}', "", [("f", {})]),  # the end mark was a stop string
    ("almost <tool_cal", "almost <tool_cal", []),
]


def parse(pieces: list[str]) -> tuple[str, ToolCallParser, list[dict[str, Any]]]:
    parser = ToolCallParser()
    text, deltas = "", []
    for number, piece in enumerate(pieces, 1):
        found = parser.feed(piece, last=number == len(pieces))
        text += found.text
        deltas += found.deltas
    return text, parser, deltas


def cuts(answer: str) -> list[list[str]]:
    rng = random.Random(answer)
    random_cuts = []
    for _ in range(20):
        places = sorted(rng.sample(range(len(answer) + 1), k=min(5, len(answer))))
        ends = [0, *places, len(answer)]
        random_cuts.append([answer[a:b] for a, b in pairwise(ends)])
    return [[answer], [*answer, ""], *random_cuts]


@pytest.mark.parametrize(("answer", "text", "calls"), CASES)
def test_text_and_calls_do_not_depend_on_the_pieces(answer: str, text: str, calls: list[tuple[str, Any]]) -> None:
    for pieces in cuts(answer):
        shown, parser, deltas = parse(pieces)
        assert shown == text
        assert [(call.name, json.loads(call.arguments)) for call in parser.calls] == calls
        names = [delta["function"]["name"] for delta in deltas if "id" in delta]
        assert names == [name for name, _ in calls]
        for index, (_, arguments) in enumerate(calls):
            streamed = [d["function"].get("arguments", "") for d in deltas if d["index"] == index]
            assert json.loads("".join(streamed)) == arguments


def test_arguments_stream_while_they_are_written() -> None:
    parser = ToolCallParser()
    first = parser.feed('<tool_call>\n{"name": "f", "arguments": {"a": ', last=False)
    assert [delta["function"] for delta in first.deltas] == [{"name": "f", "arguments": ""}, {"arguments": '{"a": '}]
    assert parser.feed("1", last=False).deltas[0]["function"] == {"arguments": "1"}
    cut_short = parser.feed("", last=True)  # by max_tokens
    assert (cut_short.text, cut_short.deltas) == ("", ())
    assert parser.calls[0].arguments == '{"a": 1'


def test_text_is_held_back_only_while_it_may_begin_a_call() -> None:
    parser = ToolCallParser()
    assert parser.feed("Hello <tool", last=False).text == "Hello"
    assert parser.feed("box>", last=False).text == " <toolbox>"


def test_call_ids_differ() -> None:
    _, parser, _ = parse([TWO])
    assert len({call.call_id for call in parser.calls}) == 2
