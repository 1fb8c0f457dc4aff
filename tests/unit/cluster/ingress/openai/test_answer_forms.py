"""vLLM's structured_outputs and guided_... fields: which answers each lets through, and which requests are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from cluster.ingress.errors import ApiError
from cluster.ingress.openai.chat_schemas import ChatBody
from cluster.ingress.openai.grammars import answer_grammar
from cluster.ingress.openai.schemas import CompletionBody, parse_body
from tests.models import DEMO_MODEL

COMPLETION = {"model": "m", "prompt": "hi"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
PAIR = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}}, "required": ["a", "b"]}
TIGHT, LOOSE = '{"a":1,"b":true}', '{\n "a" : 1, "b": true }'
LARK = 'start: "select " NAME ("," NAME)*\nNAME: /[a-z]+/'
GBNF = 'root ::= "select " name ("," name)*\nname ::= [a-z]+'
TEXTS = ["yes", "no", 'a "quoted"\nline', "größe 😀", "back\\slash"]
CALL = {"begin": "<fn=add>", "schema": PAIR, "end": "</fn>"}
OLD_TAGS = {"type": "structural_tag", "structures": [CALL], "triggers": ["<fn="]}
NEW_TAGS = {
    "type": "structural_tag",
    "format": {
        "type": "triggered_tags",
        "triggers": ["<fn=", "<id "],
        "tags": [
            {"begin": "<fn=add>", "content": {"type": "json_schema", "json_schema": PAIR}, "end": "</fn>"},
            {"begin": "<id ", "content": {"type": "regex", "pattern": "[a-c]/[0-9]+"}, "end": ">"},
            {"begin": "<fn=sql>", "content": {"type": "grammar", "grammar": GBNF}, "end": "</fn>"},
        ],
    },
}
TAGGED = [f"I add. <fn=add>{TIGHT}</fn> Done.", "no call"]


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return LLTokenizer((DEMO_MODEL / "tokenizer.json").read_text())


def grammar_of(fields: dict[str, Any]) -> str | None:
    is_chat = "tools" in fields
    raw = json.dumps({**(CHAT if is_chat else COMPLETION), **fields}).encode()
    return answer_grammar(parse_body(ChatBody if is_chat else CompletionBody, raw))


def wanted(**constraint: Any) -> dict[str, Any]:
    return {"structured_outputs": constraint}


@pytest.mark.parametrize(
    ("fields", "allowed", "refused"),
    [
        (wanted(json=PAIR), [TIGHT, LOOSE], ['{"a":1}', '{"a":"x","b":true}', '{"a":1,"b":true,"c":1}']),
        (wanted(json=json.dumps(PAIR)), [TIGHT], ['{"a":1}']),
        (wanted(json=PAIR, disable_any_whitespace=True), [TIGHT], [LOOSE, '{"a": 1,"b":true}']),
        (wanted(json=PAIR, whitespace_pattern=" ?"), [TIGHT, '{"a": 1, "b":true}'], [LOOSE]),
        (wanted(json_object=True), ["{}", LOOSE], ["[]", "text"]),
        (wanted(regex=r"\d+/[ab]"), ["12/a"], ["12/", "x12/a", "12/ab"]),
        (wanted(choice=TEXTS), TEXTS, ["maybe", "yesno", ""]),
        (wanted(grammar=LARK), ["select a", "select a,bc"], ["select ", "drop a"]),
        (wanted(grammar=GBNF), ["select a", "select a,bc"], ["select ", "drop a"]),
        (wanted(structural_tag=json.dumps(OLD_TAGS)), TAGGED, ["<fn=add>{}</fn>", "<fn=sub>"]),
        (wanted(structural_tag=json.dumps(NEW_TAGS)), [*TAGGED, "<id a/1> <fn=sql>select a</fn>"], ["<id 1>"]),
        ({"response_format": OLD_TAGS}, TAGGED, ["<fn=add>{}</fn>"]),
        ({"response_format": NEW_TAGS}, TAGGED, ["<fn=sql>drop a</fn>"]),
        ({"guided_json": PAIR}, [TIGHT], ['{"a":1}']),
        ({"guided_regex": "[a-z]{3}"}, ["abc"], ["ab", "abcd"]),
        ({"guided_choice": TEXTS}, TEXTS, ["maybe"]),
        ({"guided_grammar": GBNF}, ["select a"], ["drop a"]),
        ({"response_format": {"type": "text"}, "guided_choice": ["a"]}, ["a"], ["b"]),
    ],
)
def test_answers(tokenizer: LLTokenizer, fields: dict[str, Any], allowed: list[str], refused: list[str]) -> None:
    check(tokenizer, grammar_of(fields), allowed, refused)


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        (wanted(regex="[0-9]{3}"), "123"),
        (wanted(choice=TEXTS), TEXTS[2]),
        (wanted(json=PAIR), TIGHT),
        (wanted(grammar=GBNF), "select a"),
    ],
)
def test_with_tools_the_answer_is_of_the_form_or_calls(
    tokenizer: LLTokenizer, fields: dict[str, Any], allowed: str
) -> None:
    tools = [{"type": "function", "function": {"name": "wait"}}]
    call = '<tool_call>\n{"name": "wait", "arguments": {}}\n</tool_call>'
    check(tokenizer, grammar_of({**fields, "tools": tools}), [allowed, call], ["free text", f"{allowed}{call}"])
    check(tokenizer, grammar_of({**fields, "tools": tools, "tool_choice": "required"}), [call], [allowed])


def check(tokenizer: LLTokenizer, grammar: str | None, allowed: list[str], refused: list[str]) -> None:
    assert grammar is not None
    for answers, is_allowed in ((allowed, True), (refused, False)):
        for answer in answers:
            matcher = LLMatcher(tokenizer, grammar)
            ids = tokenizer.tokenize_str(answer)
            assert not matcher.is_error(), matcher.get_error()
            assert (matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()) is is_allowed, answer


DEEP = '{"items":' * 5000 + "{}" + "}" * 5000
WRONG_TRIGGER = {**OLD_TAGS, "triggers": ["<call"]}
NO_PATTERN = {"begin": "<id ", "content": {"type": "regex"}, "end": ">"}
SEQUENCE = {"type": "structural_tag", "format": {"type": "sequence", "elements": []}}
INCOMPLETE = {
    "type": "structural_tag",
    "format": {"type": "triggered_tags", "triggers": ["<id "], "tags": [NO_PATTERN]},
}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (wanted(), "structured_outputs"),
        (wanted(json="{"), "structured_outputs.json"),
        (wanted(json="[1]"), "structured_outputs.json"),
        (wanted(json=DEEP), "structured_outputs.json"),
        (wanted(json={"type": "no such type"}), "structured_outputs.json"),
        (wanted(json=PAIR, whitespace_pattern="("), "structured_outputs.json"),
        (wanted(regex="(a"), "structured_outputs.regex"),
        (wanted(regex="(" * 50_000 + ")" * 50_000), "structured_outputs.regex"),
        (wanted(regex="a" * 200_000), "structured_outputs.regex"),
        (wanted(choice=[]), "structured_outputs.choice"),
        (wanted(choice="yes"), "structured_outputs.choice"),
        (wanted(grammar="start: unknown"), "structured_outputs.grammar"),
        (wanted(grammar="root ::= ("), "structured_outputs.grammar"),
        (wanted(grammar="root ::= " + "(" * 30_000), "structured_outputs.grammar"),
        (wanted(grammar='{"grammars": []}'), "structured_outputs.grammar"),
        (wanted(structural_tag="{}"), "structured_outputs.structural_tag"),
        (wanted(structural_tag=json.dumps(WRONG_TRIGGER)), "structured_outputs.structural_tag"),
        (wanted(structural_tag=json.dumps(SEQUENCE)), "structured_outputs.structural_tag"),
        (wanted(structural_tag=json.dumps(INCOMPLETE)), "structured_outputs.structural_tag"),
        (wanted(regex="a", choice=["a"]), "structured_outputs.choice"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"guided_json": {"type": "no such type"}}, "guided_json"),
        ({"guided_choice": [1]}, "guided_choice.0"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refusal:
        grammar_of(fields)
    assert refusal.value.outcome.status == 400
    assert refusal.value.param == param
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500
