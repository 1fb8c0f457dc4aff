"""The OpenAI API's request bodies, read strictly: a wrong type is an error that names its field, not a guess.

Unknown fields are accepted, as clients send many; `GenerationBody.unknown_fields` names them. Ranges are checked by
the engine's SamplingParams, so that the library and the API agree. Null means "not given".
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from cluster.ingress.errors import ApiError, Outcome
from cluster.ingress.openai.answer_forms import Choices, Form, ResponseFormat, StructuredOutputs, Text, take_form
from cluster.ingress.openai.body import Body
from engine.types import SamplingParams

INT64 = 2**63
INT32 = 2**31
TokenId = Annotated[int, Field(ge=0, lt=INT64)]


def _texts(value: Any) -> Any:
    """A string or an array of strings as an array."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise ValueError("must be a string or an array of strings")


def _prompts(value: Any) -> Any:
    """One or many prompts, each a string or an array of token ids, as an array of prompts."""
    prompts = [value] if isinstance(value, str) or _is_token_ids(value) else value
    if not (isinstance(prompts, list) and all(isinstance(item, str) or _is_token_ids(item) for item in prompts)):
        raise ValueError("must be a string, an array of strings, an array of token ids, or an array of such arrays")
    if not prompts or not all(prompts):
        raise ValueError("must not be empty")
    return prompts


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int and 0 <= item < INT64 for item in value)


Texts = Annotated[
    list[str],
    BeforeValidator(_texts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
Prompts = Annotated[
    list[str | list[int]],
    BeforeValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
                TOKEN_IDS,
                {"type": "array", "items": TOKEN_IDS, "minItems": 1},
            ]
        }
    ),
]


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's: token counts in every event


class BrownoutOptions(Body):
    """A request's consent to be dimmed; ``max_loss`` is the quality loss it bears, in nats per token."""

    service_class: Literal["standard", "full"] | None = Field(default=None, alias="class")
    max_loss: Annotated[float, Field(ge=0)] | None = None


class GenerationBody(Body):
    """What both endpoints share."""

    model_config = ConfigDict(extra="allow", strict=True, populate_by_name=True)

    model: str | None = None  # the first one that the API key's tenant may use
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Texts | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, Any] | None = None
    # Beyond OpenAI, spelled as vLLM spells them.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None  # to a prompt that is text; templates write their own
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None  # keep the last so many; -1: what fits
    prompt_logprobs: int | None = None  # alternatives for each token of the prompt
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None  # in logprobs, where one text may stand for several tokens
    priority: Annotated[int, Field(ge=-INT32, lt=INT32)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    brownout: BrownoutOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None

    @property
    def form(self) -> Form | None:
        """What form the answer must have; None: free text. Raises ApiError."""
        guided = {field: getattr(self, field) for field in _GUIDED_FIELDS}
        return take_form(self.response_format, self.structured_outputs, guided)

    @property
    def unknown_fields(self) -> tuple[str, ...]:
        """Names of the fields that the client sent and nobody reads."""
        return tuple(self.model_extra or ())

    @property
    def num_choices(self) -> int:
        """Answers per prompt."""
        return self.n or 1

    @property
    def length_limit(self) -> tuple[str, int | None]:
        """The field that limits the completion's length and its value in tokens, None if the client set none."""
        return "max_tokens", self.max_tokens

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Alternatives to report per token; None: no logprobs."""

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Alternatives to report per token of the prompt; None: no logprobs of the prompt."""
        if self.prompt_logprobs is not None and self.stream:
            raise ApiError(Outcome.INVALID, "prompt_logprobs are not streamed", "prompt_logprobs")
        return self.prompt_logprobs

    def sampling_params(self, max_tokens: int, grammar: str | None = None) -> SamplingParams:
        """For the first choice of a prompt. Raises InvalidRequestError."""
        given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        return SamplingParams(
            max_tokens=max_tokens,
            logit_bias=_logit_bias(self.logit_bias or {}),
            logprobs=self.num_logprobs,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            allowed_token_ids=tuple(self.allowed_token_ids or ()),
            prompt_logprobs=self.num_prompt_logprobs,
            grammar=grammar,
            **given,
        )


_SHOULD = re.compile("^[A-Z][a-z]+ should ")  # as pydantic's messages begin
_GUIDED_FIELDS = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "min_tokens",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
)


class CompletionBody(GenerationBody):
    """POST /v1/completions"""

    prompt: Prompts
    logprobs: int | None = None
    echo: bool | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        of_prompt, of_echo = super().num_prompt_logprobs, self.logprobs if self.echo else None
        if None not in (of_prompt, of_echo) and of_prompt != of_echo:
            raise ApiError(Outcome.INVALID, "prompt_logprobs and the echo's logprobs differ", "prompt_logprobs")
        return of_echo if of_prompt is None else of_prompt


AnyBody = TypeVar("AnyBody", bound=Body)


def parse_body(kind: type[AnyBody], raw: bytes, **defaults: Any) -> AnyBody:
    """Raises ApiError (invalid) that names the first offending field. ``defaults`` stand for what is not given."""
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(Outcome.INVALID, f"the request body is not UTF-8 (byte {error.start})") from error
    try:
        if defaults:
            raw = json.dumps({**defaults, **json.loads(raw)}).encode()
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise _invalid(error, raw) from error


def _invalid(error: ValidationError, raw: bytes) -> ApiError:
    mistake = _told(error)
    if mistake["type"] == "json_invalid":
        return ApiError(
            Outcome.INVALID, f"the request body is not valid JSON: {mistake['msg'].removeprefix('Invalid JSON: ')}"
        )
    if not mistake["loc"]:
        return ApiError(Outcome.INVALID, "the request body must be a JSON object")
    param = ".".join(_keys(mistake["loc"], json.loads(raw), mistake["type"] == "missing"))
    reason = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "union_tag_invalid":
        reason = f"of type {mistake['ctx']['tag']!r} is not known; allowed: {mistake['ctx']['expected_tags']}"
    elif mistake["type"] == "union_tag_not_found":
        reason = "needs a type"
    elif mistake["type"] == "missing":
        reason = "is required"
    elif mistake["type"] == "extra_forbidden":
        reason = "is not known here"
    elif mistake["type"] == "too_short":
        reason = "must not be empty"
    elif _SHOULD.match(reason):
        reason = _SHOULD.sub("must ", reason)
    return ApiError(Outcome.INVALID, f"{param} {reason[0].lower()}{reason[1:]}", param)


def _told(error: ValidationError) -> Any:
    """The first mistake; of a value that may be a word or an object, the one in the object if it is one."""
    first, *others = error.errors(include_url=False)
    if first["type"] != "literal_error":
        return first
    place = first["loc"][:-1]
    deeper = (other for other in others if other["loc"][: len(place)] == place and len(other["loc"]) > len(place) + 1)
    return next(deeper, first)


def _keys(location: Sequence[str | int], content: Any, is_missing: bool) -> list[str]:
    """The part of pydantic's ``location`` that the client wrote; the rest names members of unions.

    The last key of a missing field is no part of ``content``.
    """
    keys = []
    for number, part in enumerate(location, 1):
        if (isinstance(content, dict) and part in content) or (isinstance(content, list) and isinstance(part, int)):
            content = content[part]  # type: ignore[index]  # a key of the one or a place in the other
            keys.append(str(part))
        elif is_missing and number == len(location):
            keys.append(str(part))
    return keys


def _logit_bias(bias: dict[str, float]) -> tuple[tuple[int, float], ...]:
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) < 20):
            raise ApiError(Outcome.INVALID, f"logit_bias keys must be token ids, got {key!r}", "logit_bias")
    return tuple((int(key), value) for key, value in bias.items())
