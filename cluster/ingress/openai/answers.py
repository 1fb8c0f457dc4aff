"""The shapes of the API's answers, for the OpenAPI document. They are built as plain dicts; tests hold both equal."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorDetail(Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    error: ErrorDetail


class PromptTokensDetails(Answer):
    cached_tokens: int


class BrownoutUsageAnswer(Answer):
    dimmed_share: float
    routed_pairs: int
    dimmed_pairs: int
    level_peak: int
    level_mean: float
    setting_version: int


class UsageAnswer(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    brownout: BrownoutUsageAnswer


class CalledFunctionAnswer(Answer):
    name: str
    arguments: str


class ToolCallAnswer(Answer):
    id: str
    type: Literal["function"]
    function: CalledFunctionAnswer


class MessageAnswer(Answer):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCallAnswer] = []


class TopLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobAnswer(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    content: list[TokenLogprobAnswer]
    refusal: None


class RankedToken(Answer):
    logprob: float
    rank: int
    decoded_token: str


class ChatChoice(Answer):
    index: int
    message: MessageAnswer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None
    token_ids: list[int] = []


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageAnswer
    service_tier: str = "auto"
    prompt_token_ids: list[int] = []
    prompt_logprobs: list[dict[str, RankedToken] | None] = []


class CompletionLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None
    token_ids: list[int] = []
    prompt_token_ids: list[int] = []
    prompt_logprobs: list[dict[str, RankedToken] | None] = []


class Completion(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageAnswer
    service_tier: str = "auto"


class ModelBrownout(Answer):
    num_levels: int
    ladder_measured: bool


class Model(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int = 0
    brownout: ModelBrownout | None = None


class ModelList(Answer):
    object: Literal["list"]
    data: list[Model]


class Tokens(Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Prompt(Answer):
    prompt: str


class Version(Answer):
    version: str


class ServerLoad(Answer):
    server_load: int


class Liveness(Answer):
    status: Literal["ok"]


class Readiness(Answer):
    status: Literal["ok", "unavailable"]
    replicas: int
    models: dict[str, int]  # replicas of each


class BrownoutStatus(BaseModel):
    """What `brownoutserve status` shows, see controller/status.py."""

    policy: dict[str, Any]
    models: dict[str, Any]
