"""Retries, timeouts and the end of streams, against a backend that fails as the test says."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest

from cluster.ingress.errors import ApiError, Outcome
from cluster.ingress.openai.completion_responses import CompletionEndpoint
from cluster.ingress.openai.responses import Choice
from cluster.ingress.stream import UsageEvents, generate, generate_all, sse_events
from cluster.reports import ReplicaReport
from cluster.transport.channel import ReplicaLostError
from engine.types import (
    BrownoutUsage,
    EngineBusyError,
    FinishReason,
    GenerationRequest,
    InvalidRequestError,
    ModelInfo,
    RequestOutput,
    SamplingParams,
    Usage,
)

REQUEST = GenerationRequest("r", (1, 2))
USAGE = Usage(prompt_tokens=2, cached_tokens=0, completion_tokens=2, brownout=BrownoutUsage())
HANG = object()


def said(text: str, reason: FinishReason | None = None) -> RequestOutput:
    return RequestOutput("r", (5,), text, finish_reason=reason, usage=USAGE if reason else None)


class ScriptedBackend:
    """Each attempt plays the next script: outputs, exceptions to raise, or HANG."""

    def __init__(self, *scripts: list[Any]) -> None:
        self._scripts = list(scripts)
        self.requests: list[GenerationRequest] = []
        self.num_closed = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestOutput, None]:
        self.requests.append(request)
        try:
            for item in self._scripts.pop(0):
                if item is HANG:
                    await asyncio.sleep(3600)
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.num_closed += 1

    async def info(self) -> ModelInfo:
        raise AssertionError

    async def reports(self) -> list[ReplicaReport]:
        raise AssertionError


async def collect(backend: ScriptedBackend, idle_timeout_s: float = 5.0) -> str:
    text = ""
    async for output in generate(backend, REQUEST, time.monotonic() - 1.0, idle_timeout_s):
        text += output.text
    return text


LOST = ReplicaLostError("lost")
WHOLE = [said("a"), said("b", FinishReason.STOP)]


async def test_a_replica_lost_before_its_first_output_is_replaced_once() -> None:
    backend = ScriptedBackend([LOST], WHOLE)
    assert await collect(backend) == "ab"
    first, second = backend.requests
    assert first.request_id != second.request_id
    assert 1.0 <= first.waited_s <= second.waited_s


@pytest.mark.parametrize(
    "scripts",
    [[[LOST], [LOST]], [[said("a"), LOST]], [[said("a")]], [[], []], [[ReplicaLostError("lost", may_retry=False)]]],
    ids=["twice", "after the first output", "stream ends early", "no output at all, twice", "no retry left"],
)
async def test_a_replica_lost_otherwise_is_an_error(scripts: list[list[Any]]) -> None:
    backend = ScriptedBackend(*scripts)
    with pytest.raises(ApiError) as caught:
        await collect(backend)
    assert caught.value.outcome is Outcome.REPLICA_LOST
    assert backend.num_closed == len(scripts)


@pytest.mark.parametrize("refusal", [InvalidRequestError("bad", "prompt"), EngineBusyError("full", 3.0)])
async def test_refusals_are_not_retried(refusal: Exception) -> None:
    backend = ScriptedBackend([refusal])
    with pytest.raises(type(refusal)):
        await collect(backend)
    assert len(backend.requests) == 1


async def test_a_silent_replica_is_given_up() -> None:
    backend = ScriptedBackend([said("a"), HANG])
    with pytest.raises(ApiError) as caught:
        await collect(backend, idle_timeout_s=0.05)
    assert caught.value.outcome is Outcome.TIMEOUT
    assert backend.num_closed == 1


async def test_an_engine_failure_is_an_error() -> None:
    failed = RequestOutput("r", finish_reason=FinishReason.ERROR, error="out of luck")
    with pytest.raises(ApiError, match="out of luck"):
        await collect(ScriptedBackend([failed]))


async def test_a_grammar_that_the_engine_gives_up_is_the_clients() -> None:
    failed = RequestOutput("r", finish_reason=FinishReason.ERROR, error="too many states")
    asking = replace(REQUEST, sampling=SamplingParams(grammar="start: x"))
    with pytest.raises(InvalidRequestError, match="too many states") as caught:
        async for _ in generate(ScriptedBackend([failed]), asking, time.monotonic(), 5.0):
            pass
    assert caught.value.param == "grammar"


async def test_the_first_failing_choice_ends_the_others() -> None:
    backend = ScriptedBackend([said("a"), HANG], [LOST], [LOST])
    requests = [REQUEST, GenerationRequest("s", (1,))]
    with pytest.raises(ApiError):
        async for _ in generate_all(backend, requests, time.monotonic(), 5.0):
            pass
    assert backend.num_closed == len(backend.requests) == 3


async def test_leaving_a_stream_closes_the_backend() -> None:
    backend = ScriptedBackend([said("a"), HANG])
    outputs = generate_all(backend, [REQUEST], time.monotonic(), 5.0)
    assert (await anext(outputs))[1].text == "a"
    await outputs.aclose()
    assert backend.num_closed == 1


async def events_of(*script: Any) -> tuple[list[str], list[Outcome]]:
    outcomes: list[Outcome] = []
    endpoint = CompletionEndpoint("cmpl-r", "m", 0, tokens=None)
    outputs = generate_all(ScriptedBackend(list(script)), [REQUEST], time.monotonic(), 5.0)
    events = sse_events(outputs, endpoint, [Choice(0)], 1, UsageEvents(at_end=True), outcomes.append)
    return [event.decode() async for event in events], outcomes


async def test_events_end_with_usage_and_done() -> None:
    events, outcomes = await events_of(*WHOLE)
    assert all(event.startswith("data: ") and event.endswith("\n\n") for event in events)
    assert events[-1] == "data: [DONE]\n\n"
    assert json.loads(events[-2][6:])["usage"]["total_tokens"] == 4
    assert outcomes == [Outcome.OK]


async def test_a_failure_after_the_first_event_is_an_error_event_and_the_end() -> None:
    events, outcomes = await events_of(said("a"), LOST)
    assert json.loads(events[0][6:])["choices"][0]["text"] == "a"
    assert json.loads(events[-1][6:])["error"]["code"] == "replica_lost"
    assert outcomes == [Outcome.REPLICA_LOST]
