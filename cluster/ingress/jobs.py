"""From an API body to engine requests: model, prompt, length, choices, consent to be dimmed."""

from __future__ import annotations

import asyncio
import re
import secrets
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.ingress.errors import ApiError, Outcome
from cluster.ingress.schemas import INT64, ChatBody, CompletionBody, GenerationBody
from engine.tokenizer import Tokenizer
from engine.types import GenerationRequest, ModelInfo, ServiceClass

CLASS_HEADER = "x-brownout-class"
REQUEST_ID_HEADER = "x-request-id"
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for /v1/completions
MAX_CHOICES = 64  # n times the number of prompts
INLINE_CHARACTERS = 4096  # longer prompts are tokenized in a thread, so that they hold up no other stream


@dataclass(frozen=True, slots=True)
class Job:
    """What one API request asks of the engines; ``echo_texts`` go before the answers if it asked for an echo."""

    requests: tuple[GenerationRequest, ...]  # choice by choice, those of one prompt side by side
    num_choices_per_prompt: int
    echo_texts: tuple[str, ...] = ()


def take_request_id(headers: Mapping[str, str]) -> str:
    """The client's id, or the one that Serve gave it, if it is a sensible one; else a new one.

    Serve sends the header back with the response.
    """
    given = headers.get(REQUEST_ID_HEADER, "")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def service_class(body: GenerationBody, headers: Mapping[str, str], info: ModelInfo) -> ServiceClass:
    """FULL if header or body say so, or if some level's quality loss is unknown or more than the request bears."""
    header = headers.get(CLASS_HEADER)
    if header is not None and header not in tuple(ServiceClass):
        raise ApiError(
            Outcome.INVALID, f"{CLASS_HEADER} must be one of {', '.join(ServiceClass)}, got {header!r}", CLASS_HEADER
        )
    options = body.brownout
    if ServiceClass.FULL in (header, options.service_class if options else None):
        return ServiceClass.FULL
    if options is not None and options.max_loss is not None:
        may_dim = info.ladder_measured and max(info.level_loss, default=0.0) <= options.max_loss
        return ServiceClass.STANDARD if may_dim else ServiceClass.FULL
    return ServiceClass.STANDARD


async def make_job(
    body: GenerationBody, headers: Mapping[str, str], request_id: str, info: ModelInfo, tokenizer: Tokenizer
) -> Job:
    """Raises ApiError or InvalidRequestError naming the field."""
    consent = service_class(body, headers, info)
    prompts, field = await _prompts(body, tokenizer)
    num_choices = body.num_choices
    if len(prompts) * num_choices > MAX_CHOICES:
        raise ApiError(
            Outcome.INVALID,
            f"n times the number of prompts is {len(prompts) * num_choices}, the most is {MAX_CHOICES}",
            "n",
        )
    # Clients may send the same id twice at a time; the engine must not see that.
    engine_id = f"{request_id}-{secrets.token_hex(3)}"
    requests: list[GenerationRequest] = []
    for prompt_ids in prompts:
        sampling = body.sampling_params(_max_tokens(body, field, len(prompt_ids), info.max_model_len))
        for number in range(num_choices):
            seed = None if sampling.seed is None else (sampling.seed + number) % INT64
            requests.append(
                GenerationRequest(
                    request_id=f"{engine_id}-{len(requests)}" if len(prompts) * num_choices > 1 else engine_id,
                    prompt_ids=prompt_ids,
                    sampling=replace(sampling, seed=seed) if number else sampling,
                    service_class=consent,
                )
            )
    return Job(tuple(requests), num_choices, _echo_texts(body, prompts, tokenizer))


async def _prompts(body: GenerationBody, tokenizer: Tokenizer) -> tuple[list[tuple[int, ...]], str]:
    """Token ids of each prompt, and the field they came from."""
    if isinstance(body, ChatBody):
        text = tokenizer.apply_chat_template([message.model_dump() for message in body.messages])
        return [await _encode(text, "messages", tokenizer, add_special_tokens=False)], "messages"
    assert isinstance(body, CompletionBody)
    prompts = []
    for prompt in body.prompt:
        if isinstance(prompt, str):
            prompts.append(await _encode(prompt, "prompt", tokenizer, add_special_tokens=True))
        else:
            prompts.append(tuple(prompt))
    return prompts, "prompt"


async def _encode(text: str, field: str, tokenizer: Tokenizer, add_special_tokens: bool) -> tuple[int, ...]:
    if len(text) <= INLINE_CHARACTERS:
        ids = tokenizer.encode(text, add_special_tokens)
    else:
        ids = await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)
    if not ids:
        raise ApiError(Outcome.INVALID, f"{field} must not be empty", field)
    return tuple(ids)


def _max_tokens(body: GenerationBody, prompt_field: str, num_prompt_tokens: int, max_model_len: int) -> int:
    """The completion's length limit in tokens."""
    room = max_model_len - num_prompt_tokens
    if room < 1:
        raise ApiError(
            Outcome.INVALID,
            f"{prompt_field} has {num_prompt_tokens} tokens; the model's context holds {max_model_len}, "
            "one of them for the answer",
            prompt_field,
        )
    field, wanted = body.length_limit
    if wanted is None:
        return room if isinstance(body, ChatBody) else min(DEFAULT_COMPLETION_TOKENS, room)
    if not 1 <= wanted <= room:
        raise ApiError(
            Outcome.INVALID,
            f"{field} must be between 1 and {room} after {num_prompt_tokens} prompt tokens "
            f"(the model's context holds {max_model_len}), got {wanted}",
            field,
        )
    return wanted


def _echo_texts(body: GenerationBody, prompts: Sequence[tuple[int, ...]], tokenizer: Tokenizer) -> tuple[str, ...]:
    """For each choice the text to repeat before its answer."""
    if not (isinstance(body, CompletionBody) and body.echo):
        return ()
    texts = [
        given if isinstance(given, str) else tokenizer.decode(ids)
        for given, ids in zip(body.prompt, prompts, strict=True)
    ]
    return tuple(text for text in texts for _ in range(body.num_choices))
