"""From an API body to engine requests: prompt, length, choices, the answer's form, consent to be dimmed."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.admission.tenants import Tenant, TenantLimits
from cluster.ingress.errors import ApiError, Outcome
from cluster.ingress.openai.chat_schemas import ChatBody, ChatMessage
from cluster.ingress.openai.grammars import answer_grammar, grammar_param
from cluster.ingress.openai.schemas import INT64, CompletionBody, GenerationBody
from engine.text.tokenizer import Tokenizer
from engine.types import GenerationRequest, ModelInfo, SamplingParams, ServiceClass

CLASS_HEADER = "x-brownout-class"
SESSION_HEADER = "x-session-id"  # requests of one session go to one replica if they can
MAX_SESSION_CHARACTERS = 128
FULL_TIERS = ("scale", "priority")  # OpenAI's service tiers that pay for the undimmed model
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for /v1/completions
MAX_CHOICES = 64  # n times the number of prompts
INLINE_CHARACTERS = 4096  # longer texts are handled in a thread, so that they hold up no other stream


@dataclass(frozen=True, slots=True)
class Job:
    """What one API request asks of the engines; ``echo_texts`` go before the answers if it asked for an echo."""

    requests: tuple[GenerationRequest, ...]  # choice by choice, those of one prompt side by side
    num_choices_per_prompt: int
    echo_texts: tuple[str, ...] = ()
    echo_only: bool = False  # max_tokens 0: the engine's one token is not part of the answer
    parses_tools: bool = False
    grammar_param: str | None = None  # the field that the answer's grammar comes from


def service_class(
    body: GenerationBody, headers: Mapping[str, str], info: ModelInfo, limits: TenantLimits
) -> ServiceClass:
    """What the request asks for, else its tenant's. Raises ApiError when the tenant may not ask for FULL."""
    asked = _asked_class(body, headers, info)
    if asked is ServiceClass.FULL and not limits.may_ask_full and limits.service_class is not ServiceClass.FULL:
        raise ApiError(Outcome.FORBIDDEN, "the API key's tenant may not refuse to be dimmed", "brownout")
    return asked or limits.service_class


def _asked_class(body: GenerationBody, headers: Mapping[str, str], info: ModelInfo) -> ServiceClass | None:
    """FULL if header, body or service tier say so, or if some level's quality loss is unknown or more than the
    request bears; None if it says nothing.
    """
    header = headers.get(CLASS_HEADER)
    if header is not None and header not in tuple(ServiceClass):
        raise ApiError(
            Outcome.INVALID, f"{CLASS_HEADER} must be one of {', '.join(ServiceClass)}, got {header!r}", CLASS_HEADER
        )
    options = body.brownout
    if ServiceClass.FULL in (header, options.service_class if options else None) or body.service_tier in FULL_TIERS:
        return ServiceClass.FULL
    if options is not None and options.max_loss is not None:
        may_dim = info.ladder_measured and max(info.level_loss, default=0.0) <= options.max_loss
        return ServiceClass.STANDARD if may_dim else ServiceClass.FULL
    said_standard = ServiceClass.STANDARD in (header, options.service_class if options else None)
    return ServiceClass.STANDARD if said_standard else None


async def make_job(
    body: GenerationBody,
    headers: Mapping[str, str],
    request_id: str,
    info: ModelInfo,
    tokenizer: Tokenizer,
    traceparent: str,
    tenant: Tenant,
) -> Job:
    """Raises ApiError or InvalidRequestError naming the field."""
    consent = service_class(body, headers, info, tenant.limits)
    prompts, field = await _prompts(body, tokenizer, info.max_model_len)
    num_choices = body.num_choices
    if len(prompts) * num_choices > MAX_CHOICES:
        raise ApiError(
            Outcome.INVALID,
            f"n times the number of prompts is {len(prompts) * num_choices}, the most is {MAX_CHOICES}",
            "n",
        )
    grammar = await _grammar(body)
    # Clients may send the same id twice at a time; the engine must not see that.
    session_id = (headers.get(SESSION_HEADER) or body.prompt_cache_key or body.user or "")[:MAX_SESSION_CHARACTERS]
    engine_id = f"{request_id}-{secrets.token_hex(3)}"
    requests: list[GenerationRequest] = []
    for prompt_ids in prompts:
        max_tokens = _max_tokens(body, field, len(prompt_ids), info.max_model_len)
        sampling = body.sampling_params(max(1, max_tokens), grammar)
        for number in range(num_choices):
            requests.append(
                GenerationRequest(
                    request_id=f"{engine_id}-{len(requests)}" if len(prompts) * num_choices > 1 else engine_id,
                    prompt_ids=prompt_ids,
                    sampling=_of_choice(sampling, number),
                    service_class=consent,
                    priority=body.priority or 0,
                    traceparent=traceparent,
                    session_id=session_id,
                    cache_salt=cache_salt(body, tenant),
                )
            )
    return Job(
        requests=tuple(requests),
        num_choices_per_prompt=num_choices,
        echo_texts=_echo_texts(body, prompts, tokenizer),
        echo_only=body.length_limit[1] == 0,
        parses_tools=isinstance(body, ChatBody) and bool(body.offered_tools),
        grammar_param=None if grammar is None else grammar_param(body),
    )


def cache_salt(body: GenerationBody, tenant: Tenant) -> str:
    """Who shares cached prefixes: within a tenant, requests of one ``cache_salt``. Tenants' names hold no newline."""
    own = body.cache_salt or ""
    return f"{tenant.name}\n{own}" if tenant.key_id else own


def _of_choice(sampling: SamplingParams, number: int) -> SamplingParams:
    """Choices of one prompt differ by their seed only."""
    if number == 0 or sampling.seed is None:
        return sampling
    return replace(sampling, seed=(sampling.seed + number) % INT64)


async def _grammar(body: GenerationBody) -> str | None:
    tools = body.tools if isinstance(body, ChatBody) else None
    if tools or body.form is not None:  # a large schema takes long to check
        return await asyncio.to_thread(answer_grammar, body)
    return None


async def _prompts(body: GenerationBody, tokenizer: Tokenizer, max_model_len: int) -> tuple[list[tuple[int, ...]], str]:
    """Token ids of each prompt, and the field they came from."""
    if isinstance(body, ChatBody):
        field = "messages"
        given: Sequence[str | list[int]] = [render_chat(body, tokenizer)]
    else:
        assert isinstance(body, CompletionBody)
        field, given = "prompt", body.prompt
    adds_special = isinstance(body, CompletionBody) if body.add_special_tokens is None else body.add_special_tokens
    prompts = [
        await encode(prompt, field, tokenizer, adds_special) if isinstance(prompt, str) else tuple(prompt)
        for prompt in given
    ]
    return [_truncated(prompt, body, max_model_len) for prompt in prompts], field


def _truncated(prompt: tuple[int, ...], body: GenerationBody, max_model_len: int) -> tuple[int, ...]:
    """Its end, if the request wants no more than that."""
    most = body.truncate_prompt_tokens
    if most is None:
        return prompt
    if most == -1:
        most = max(1, max_model_len - (body.length_limit[1] or 1))
    if most == 0:
        param = "truncate_prompt_tokens"
        raise ApiError(Outcome.INVALID, f"{param} must be -1 (what fits) or at least 1, got 0", param)
    return prompt[-most:]


def render_chat(body: ChatBody, tokenizer: Tokenizer) -> str:
    """The conversation as the model's chat template words it."""
    prompt = tokenizer.apply_chat_template(
        [_template_message(message) for message in body.messages],
        add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
        tools=[tool.model_dump(exclude_none=True) for tool in body.offered_tools],
        variables=body.chat_template_kwargs,
    )
    return _open_ended(prompt, body.messages[-1].content) if body.continue_final_message else prompt


def _open_ended(prompt: str, last: str) -> str:
    """The prompt without what its template writes after the last message. Templates may strip blanks from a message."""
    for words in (last, last.strip()):
        place = prompt.rfind(words)
        if words and place >= 0:
            return prompt[: place + len(words)]
    raise ApiError(
        Outcome.INVALID,
        "continue_final_message: the model's chat template does not show the last message's content",
        "continue_final_message",
    )


def _template_message(message: ChatMessage) -> dict[str, Any]:
    """As templates expect it: a call's arguments are an object, not text."""
    given = message.model_dump(exclude_none=True)
    for call in given.get("tool_calls", ()):
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        except ValueError as error:
            raise ApiError(
                Outcome.INVALID, f"messages: a tool call's arguments are not JSON: {error}", "messages"
            ) from error
    return given


async def encode(text: str, field: str, tokenizer: Tokenizer, add_special_tokens: bool) -> tuple[int, ...]:
    """Token ids, at least one. Raises ApiError or InvalidRequestError naming ``field``."""
    if len(text) <= INLINE_CHARACTERS:
        ids = tokenizer.encode(text, add_special_tokens)
    else:
        ids = await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)
    if not ids:
        raise ApiError(Outcome.INVALID, f"{field} must not be empty", field)
    return tuple(ids)


def _max_tokens(body: GenerationBody, prompt_field: str, num_prompt_tokens: int, max_model_len: int) -> int:
    """The completion's length limit in tokens; 0 is allowed for an echo alone."""
    room = max_model_len - num_prompt_tokens
    if room < 1:
        raise ApiError(
            Outcome.CONTEXT_LENGTH,
            f"{prompt_field} has {num_prompt_tokens} tokens; the model's context holds {max_model_len}, "
            "one of them for the answer",
            prompt_field,
        )
    field, wanted = body.length_limit
    if wanted is None:
        return room if isinstance(body, ChatBody) else min(DEFAULT_COMPLETION_TOKENS, room)
    least = 0 if isinstance(body, CompletionBody) and body.echo else 1
    if not least <= wanted <= room:
        raise ApiError(
            Outcome.CONTEXT_LENGTH if wanted > room else Outcome.INVALID,
            f"{field} must be between {least} and {room} after {num_prompt_tokens} prompt tokens "
            f"(the model's context holds {max_model_len}), got {wanted}",
            field,
        )
    return wanted


def _echo_texts(body: GenerationBody, prompts: Sequence[tuple[int, ...]], tokenizer: Tokenizer) -> tuple[str, ...]:
    """For each choice the text to repeat before its answer."""
    if not (isinstance(body, CompletionBody) and body.echo):
        return ()
    texts = [
        given if isinstance(given, str) and body.truncate_prompt_tokens is None else tokenizer.decode(ids)
        for given, ids in zip(body.prompt, prompts, strict=True)
    ]
    return tuple(text for text in texts for _ in range(body.num_choices))
