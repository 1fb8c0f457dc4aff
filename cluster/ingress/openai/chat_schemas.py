"""The body of POST /v1/chat/completions: messages and tools."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from cluster.ingress.errors import ApiError, Outcome
from cluster.ingress.openai.body import Body
from cluster.ingress.openai.schemas import GenerationBody

TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}


def _content(value: Any) -> Any:
    """A message's text: a string, or an array of parts of type "text"."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise ValueError("must be a string or an array of content parts")
    for part in value:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise ValueError('must hold parts {"type": "text", "text": "..."} only: this model reads text')
    return "".join(part["text"] for part in value)


Content = Annotated[
    str,
    BeforeValidator(_content),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "null"}, {"type": "array", "items": TEXT_PART}]}),
]


class CalledFunction(Body):
    name: str
    arguments: str = "{}"  # JSON


class CalledTool(Body):
    """A call that the model made earlier in the conversation."""

    model_config = ConfigDict(extra="allow", strict=True)

    function: CalledFunction


class ChatMessage(Body):
    model_config = ConfigDict(extra="allow", strict=True)  # the chat template may use more of a message

    role: str
    content: Content = ""
    tool_calls: list[CalledTool] | None = None


class Function(Body):
    name: Annotated[str, Field(pattern="^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class ChatBody(GenerationBody):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    # Beyond OpenAI, spelled as vLLM spells them.
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None  # the answer goes on where the last message ends
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _tool_choice_names_a_tool(self) -> ChatBody:
        names = [tool.function.name for tool in self.tools or ()]
        choice = self.tool_choice
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise ApiError(
                Outcome.INVALID, f"tool_choice names {choice.function.name!r}, which tools do not hold", "tool_choice"
            )
        if choice == "required" and not names:
            raise ApiError(Outcome.INVALID, 'tool_choice "required" needs tools', "tool_choice")
        if len(set(names)) < len(names):
            raise ApiError(Outcome.INVALID, "tools must not hold a name twice", "tools")
        return self

    @model_validator(mode="after")
    def _one_end_of_the_prompt(self) -> ChatBody:
        if self.continue_final_message and self.add_generation_prompt:
            raise ApiError(
                Outcome.INVALID,
                "continue_final_message and add_generation_prompt cannot both be true",
                "continue_final_message",
            )
        return self

    @property
    def length_limit(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(Outcome.INVALID, "top_logprobs needs logprobs to be true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model may call; none with tool_choice "none"."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def required_tools(self) -> list[Tool]:
        """The tools of which the answer must call one; empty: it need not call any."""
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.offered_tools if tool.function.name == self.tool_choice.function.name]
        return self.offered_tools if self.tool_choice == "required" else []
