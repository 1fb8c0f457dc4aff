"""The form that a request may ask of its answer, as bodies spell it: response_format, and vLLM's structured_outputs.

| asked for with                          | the answer is                                     |
|-----------------------------------------|---------------------------------------------------|
| response_format json_object             | some JSON object                                  |
| response_format json_schema             | JSON by a schema                                  |
| response_format structural_tag          | free text in which tags are followed by a grammar |
| structured_outputs json, json_object    | JSON by a schema, some JSON object                |
| structured_outputs regex, guided_regex  | what the regular expression matches as a whole    |
| structured_outputs choice               | one of the texts                                  |
| structured_outputs grammar              | a sentence of a Lark or GBNF grammar              |
| structured_outputs structural_tag       | as response_format structural_tag, as JSON text   |
| guided_json, _regex, _choice, _grammar  | vLLM's names of the same until its release 0.12   |
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from cluster.ingress.errors import ApiError, Outcome
from cluster.ingress.openai.body import Body

MAX_GRAMMAR_CHARACTERS = 128 * 1024  # of a regular expression or a grammar; larger ones take seconds to compile

Text = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARACTERS)]
Choices = Annotated[list[Text], Field(min_length=1, max_length=4096)]


class JsonSchema(Body):
    model_config = ConfigDict(extra="ignore", strict=True, populate_by_name=True, protected_namespaces=())

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class Structure(Body):
    """What stands between ``begin`` and ``end`` follows ``schema``."""

    model_config = ConfigDict(extra="ignore", strict=True, populate_by_name=True, protected_namespaces=())

    begin: Text
    schema_: dict[str, Any] = Field(alias="schema")
    end: str


class TagContent(Body):
    type: Literal["json_schema", "regex", "grammar"]
    json_schema: dict[str, Any] | None = None
    pattern: Text | None = None
    grammar: Text | None = None


class Tag(Body):
    begin: Text
    content: TagContent
    end: str


class TriggeredTags(Body):
    type: Literal["triggered_tags"]
    triggers: Choices
    tags: Annotated[list[Tag], Field(min_length=1)]
    at_least_one: Literal[False] | None = None
    stop_after_first: Literal[False] | None = None


class StructuralTagFormat(Body):
    """Free text; a tag that begins with one of the triggers must go on as its content says.

    Either ``structures`` and ``triggers``, or a ``format`` of type triggered_tags.
    """

    type: Literal["structural_tag"]
    structures: Annotated[list[Structure], Field(min_length=1)] | None = None
    triggers: Choices | None = None
    format: TriggeredTags | None = None

    def tags(self) -> tuple[list[str], list[Tag]]:
        """(triggers, tags). Raises ValueError."""
        if self.format is not None:
            return self.format.triggers, self.format.tags
        if self.structures is None or self.triggers is None:
            raise ValueError("needs structures and triggers, or a format")
        contents = [TagContent(type="json_schema", json_schema=each.schema_) for each in self.structures]
        return self.triggers, [
            Tag(begin=each.begin, content=content, end=each.end)
            for each, content in zip(self.structures, contents, strict=True)
        ]


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | StructuralTagFormat, Field(discriminator="type")
]


class StructuredOutputs(Body):
    """vLLM's StructuredOutputsParams: exactly one constraint, and options of those on JSON."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")  # a schema, or one as JSON text
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    json_object: bool | None = None
    structural_tag: Text | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None  # objects hold what they list here, as they do without it
    whitespace_pattern: Text | None = None


@dataclass(frozen=True, slots=True)
class Form:
    """One constraint on an answer. ``param`` is the request's field, for errors."""

    kind: Literal["json", "regex", "choice", "grammar", "tags"]
    value: Any  # a schema, a text, a list of texts, a StructuralTagFormat
    param: str
    strict: bool = False  # a keyword of the schema that cannot be enforced is an error
    whitespace: str | None = None  # that JSON may have between its parts; None: the usual, empty: none


def take_form(
    response_format: ResponseFormat | None, structured: StructuredOutputs | None, guided: dict[str, Any]
) -> Form | None:
    """The one form that a request asks for; None: free text. ``guided``: what it sent as guided_..., by field.

    Raises ApiError (invalid) when it asks for several, or for one that cannot be read.
    """
    forms = [_of_response_format(response_format)] if response_format is not None else []
    if structured is not None:
        forms += _of_structured_outputs(structured)
    for field, value in guided.items():
        if value is not None:
            kind = field.removeprefix("guided_")
            forms.append(Form(kind, _schema(value, field) if kind == "json" else value, field))  # type: ignore[arg-type]
    given = [form for form in forms if form is not None]
    if len(given) > 1:
        names = ", ".join(form.param for form in given)
        raise ApiError(Outcome.INVALID, f"an answer has one form; the request asks for {names}", given[1].param)
    return given[0] if given else None


def _of_response_format(wanted: ResponseFormat) -> Form | None:
    match wanted:
        case JsonObjectFormat():
            return Form("json", {"type": "object"}, "response_format", strict=True)
        case JsonSchemaFormat(json_schema=named):
            return Form("json", named.schema_, "response_format", strict=bool(named.strict))
        case StructuralTagFormat():
            return Form("tags", wanted, "response_format")
        case _:
            return None


def _of_structured_outputs(wanted: StructuredOutputs) -> list[Form | None]:
    where = "structured_outputs"
    whitespace = "" if wanted.disable_any_whitespace else wanted.whitespace_pattern
    forms: list[Form | None] = []
    if wanted.json_ is not None:
        forms.append(Form("json", _schema(wanted.json_, f"{where}.json"), f"{where}.json", whitespace=whitespace))
    if wanted.json_object:
        forms.append(Form("json", {"type": "object"}, f"{where}.json_object", strict=True, whitespace=whitespace))
    if wanted.regex is not None:
        forms.append(Form("regex", wanted.regex, f"{where}.regex"))
    if wanted.choice is not None:
        forms.append(Form("choice", wanted.choice, f"{where}.choice"))
    if wanted.grammar is not None:
        forms.append(Form("grammar", wanted.grammar, f"{where}.grammar"))
    if wanted.structural_tag is not None:
        forms.append(Form("tags", _tags(wanted.structural_tag, f"{where}.structural_tag"), f"{where}.structural_tag"))
    if not forms:
        raise ApiError(
            Outcome.INVALID,
            f"{where} needs one of json, json_object, regex, choice, grammar, structural_tag",
            where,
        )
    return forms


def _schema(given: dict[str, Any] | str, param: str) -> dict[str, Any]:
    try:
        schema = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError) as error:
        raise ApiError(Outcome.INVALID, f"{param} is not valid JSON: {error}", param) from error
    if not isinstance(schema, dict):
        raise ApiError(Outcome.INVALID, f"{param} must be a JSON schema: an object", param)
    return schema


def _tags(text: str, param: str) -> StructuralTagFormat:
    try:
        return StructuralTagFormat.model_validate_json(text)
    except ValidationError as error:
        mistake = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, mistake["loc"]))
        raise ApiError(Outcome.INVALID, f"{param}: {place}: {mistake['msg']}", param) from error
