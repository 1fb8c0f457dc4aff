"""One API request's way through the engines: retried while nothing was said, merged over choices, never hanging."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from cluster.ingress.backend import Backend
from cluster.ingress.errors import ApiError, Outcome, to_api_error
from cluster.ingress.openai.responses import Choice, Endpoint, running_usage, usage_object
from cluster.ingress.stalls import StallWatch
from cluster.transport.channel import ReplicaLostError
from engine.types import FinishReason, GenerationRequest, InvalidRequestError, RequestOutput

NUM_ATTEMPTS = 2
MIN_SHARED_TOKENS = 32  # a shorter prompt costs less than the wait for its first choice
DONE = b"data: [DONE]\n\n"


async def generate(
    backend: Backend, request: GenerationRequest, arrived_s: float, idle_timeout_s: float, until_s: float = math.inf
) -> AsyncGenerator[RequestOutput, None]:
    """One choice. A replica lost before its first output is replaced by another, once; a silent one is given up.

    ``arrived_s``: when the API request came, on the monotonic clock, ``until_s``: when it must have ended. Raises
    ApiError and the engine's refusals.
    """
    said_something = False
    for attempt in range(NUM_ATTEMPTS):
        # A new id, because the first replica may be alive, only cut off, and still hold the old one.
        request_id = f"{request.request_id}-retry" if attempt else request.request_id
        sent = replace(request, request_id=request_id, waited_s=time.monotonic() - arrived_s)
        try:
            async with aclosing(backend.generate(sent)) as outputs:
                async for output in _within(outputs, idle_timeout_s, until_s):
                    if output.finish_reason is FinishReason.ERROR:
                        raise _failure(request, output)
                    said_something = True
                    yield output
                    if output.finished:
                        return
            raise ReplicaLostError("the replica ended the request's stream too early")
        except ReplicaLostError as error:
            if said_something or attempt == NUM_ATTEMPTS - 1 or not error.may_retry:
                raise ApiError(Outcome.REPLICA_LOST, str(error)) from error


def _failure(request: GenerationRequest, output: RequestOutput) -> Exception:
    """Why the engine gave the request up. A grammar that it cannot go on with is the client's."""
    if request.sampling.grammar is not None:
        return InvalidRequestError(f"the grammar cannot be followed to its end: {output.error}", "grammar")
    return ApiError(Outcome.BROKEN, output.error or "the engine failed to process the request")


async def _within(
    outputs: AsyncIterator[RequestOutput], idle_timeout_s: float, until_s: float
) -> AsyncIterator[RequestOutput]:
    """The same outputs; ApiError when one lets wait for more than ``idle_timeout_s``, or beyond ``until_s``."""
    while True:
        left_s = until_s - time.monotonic()
        try:
            async with asyncio.timeout(min(idle_timeout_s, left_s)):
                output = await anext(outputs)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            silent = f"the engine said nothing for {idle_timeout_s:g} s"
            message = silent if idle_timeout_s < left_s else "the answer took longer than is allowed here"
            raise ApiError(Outcome.TIMEOUT, message) from error
        yield output


async def generate_all(
    backend: Backend,
    requests: Sequence[GenerationRequest],
    arrived_s: float,
    idle_timeout_s: float,
    num_choices_per_prompt: int = 1,
    until_s: float = math.inf,
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """(choice, output) of several choices as they come. The first failure ends them all.

    The choices of one long prompt begin once the first of them has said something: by then the prompt is in the
    prefix cache, and none of the others computes it again.
    """
    if len(requests) == 1:
        async with aclosing(generate(backend, requests[0], arrived_s, idle_timeout_s, until_s)) as outputs:
            async for output in outputs:
                yield 0, output
        return
    merged: asyncio.Queue[tuple[int, RequestOutput | Exception]] = asyncio.Queue()

    begun = [asyncio.Event() for _ in requests]

    async def pump(index: int, request: GenerationRequest) -> None:
        leader = index - index % num_choices_per_prompt
        try:
            if index != leader and len(request.prompt_ids) >= MIN_SHARED_TOKENS:
                await begun[leader].wait()
            async with aclosing(generate(backend, request, arrived_s, idle_timeout_s, until_s)) as outputs:
                async for output in outputs:
                    begun[index].set()
                    merged.put_nowait((index, output))
        except Exception as error:
            merged.put_nowait((index, error))

    pumps = [asyncio.create_task(pump(index, request)) for index, request in enumerate(requests)]
    try:
        num_open = len(requests)
        while num_open:
            index, item = await merged.get()
            if isinstance(item, Exception):
                raise item
            yield index, item
            num_open -= item.finished
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def without_answer(
    outputs: AsyncGenerator[tuple[int, RequestOutput], None],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """The same without the one token that the engine generates for a request that wants its prompt back only."""
    async with aclosing(outputs):
        async for index, output in outputs:
            usage = output.usage and replace(output.usage, completion_tokens=0)
            logprobs = None if output.logprobs is None else ()
            reason = output.finish_reason and FinishReason.LENGTH
            yield (
                index,
                output._replace(
                    token_ids=(), text="", logprobs=logprobs, usage=usage, finish_reason=reason, stop_reason=None
                ),
            )


@dataclass(frozen=True, slots=True)
class UsageEvents:
    """When a stream tells its token counts."""

    at_end: bool = False
    continuous: bool = False  # with every event


async def sse_events(
    outputs: AsyncIterator[tuple[int, RequestOutput]],
    endpoint: Endpoint,
    choices: Sequence[Choice],
    num_choices_per_prompt: int,
    usage_events: UsageEvents,
    on_outcome: Callable[[Outcome], None],
) -> AsyncGenerator[bytes, None]:
    """Server-sent events as OpenAI sends them. A failure is an event ``{"error": ...}``, then the stream ends."""
    started: set[int] = set()
    try:
        async for index, output in outputs:
            choice, first = choices[index], index not in started
            started.add(index)
            chunk = endpoint.chunk(choice, output, first)
            choice.take(output)
            if chunk is not None:
                if usage_events.continuous:
                    chunk["usage"] = running_usage(choices, num_choices_per_prompt)
                yield _event(chunk)
        if usage_events.at_end:
            yield _event(endpoint.usage_chunk(usage_object(choices, num_choices_per_prompt)))
        yield DONE
        on_outcome(Outcome.OK)
    except Exception as error:
        failure = to_api_error(error)
        on_outcome(failure.outcome)
        yield _event(failure.body())


def _event(content: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class EventStreamResponse(StreamingResponse):
    """Awaits ``on_end`` however the stream ends; it is told how if the stream has not told itself.

    ``stalls`` ends it when the client takes nothing.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
        on_end: Callable[[Outcome], Awaitable[None]],
        stalls: StallWatch,
    ) -> None:
        super().__init__(events, headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        self._events = events
        self._on_end = on_end
        self._stalls = stalls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._stalls.guard(send) as guarded:
            try:
                async with aclosing(self._events):
                    await super().__call__(scope, receive, guarded)
            except asyncio.CancelledError:
                if not guarded.stalled:
                    raise
                guarded.task.uncancel()  # the server closes a connection whose response is left unfinished
            finally:
                await self._on_end(Outcome.STALLED if guarded.stalled else Outcome.DISCONNECTED)
