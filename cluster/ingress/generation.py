"""POST /v1/chat/completions and /v1/completions: from the first byte of a body to the last event of its answer."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from urllib.parse import quote

from fastapi import FastAPI, Request, Response

from cluster.ingress.admission import Admission, Permit
from cluster.ingress.errors import ApiError, Outcome, json_response
from cluster.ingress.openai.chat_responses import ChatEndpoint
from cluster.ingress.openai.chat_schemas import ChatBody
from cluster.ingress.openai.completion_responses import CompletionEndpoint
from cluster.ingress.openai.jobs import Job, make_job
from cluster.ingress.openai.responses import Choice, Endpoint, usage_object
from cluster.ingress.openai.schemas import CompletionBody, GenerationBody, StreamOptions, parse_body
from cluster.ingress.openai.tool_calls import ToolCallParser
from cluster.ingress.service import OpenAIService, ServedModel
from cluster.ingress.stream import EventStreamResponse, UsageEvents, generate_all, sse_events, without_answer
from cluster.ingress.visit import Visit
from engine.types import InvalidRequestError, ModelInfo, RequestOutput

LEVEL_HEADER, SHARE_HEADER, SETTING_HEADER = "x-brownout-level", "x-brownout-share", "x-brownout-setting"
IGNORED_HEADER = "x-ignored-fields"
MAX_WAIT_HEADER = "x-max-wait-ms"
MAX_IGNORED_NAMED = 32
MAX_NAME_CHARACTERS = 64


@dataclass(frozen=True, slots=True)
class Route:
    """One generating route: its body, its answers' shape, the prefix of its response ids."""

    name: str
    path: str
    body: type[GenerationBody]
    endpoint: type[Endpoint]
    id_prefix: str


CHAT = Route("chat_completions", "/v1/chat/completions", ChatBody, ChatEndpoint, "chatcmpl-")
COMPLETIONS = Route("completions", "/v1/completions", CompletionBody, CompletionEndpoint, "cmpl-")


def add_routes(api: FastAPI, service: OpenAIService) -> None:
    for route in (CHAT, COMPLETIONS):
        api.post(route.path, name=route.name)(_endpoint(service, Generation(service, route)))


def _endpoint(service: OpenAIService, generation: Generation) -> Callable[[Request], Awaitable[Response]]:
    async def generate(request: Request) -> Response:
        return await service.answer(request, generation.route.name, generation.handle)

    return generate


class Generation:
    """One route's requests."""

    def __init__(self, service: OpenAIService, route: Route) -> None:
        self.route = route
        self._service = service

    async def handle(self, request: Request, visit: Visit) -> Response:
        service = self._service
        body = parse_body(self.route.body, await service.read_body(request))
        model = service.model(body.model, visit.tenant)
        info = await model.backend.info()
        traceparent = visit.trace.traceparent
        job = await make_job(body, request.headers, visit.request_id, info, model.tokenizer, traceparent, visit.tenant)
        visit.begin(job.requests, bool(body.stream))
        headers = self._ignored(body)
        if service.admission is not None:
            job, permit = await admitted(service.admission, visit, model, info, job, request.headers)
            headers |= permit.headers
        if body.stream:
            return await self._streamed(visit, job, body, model, headers)
        return await self._whole(visit, job, body, model, headers)

    async def _whole(
        self, visit: Visit, job: Job, body: GenerationBody, model: ServedModel, headers: Mapping[str, str]
    ) -> Response:
        choices = _choices(job)
        async with aclosing(self._outputs(visit, job, model)) as outputs:
            async for index, output in outputs:
                choices[index].take(output)
        usage = usage_object(choices, job.num_choices_per_prompt)
        visit.note_answer(choices, job.num_choices_per_prompt)
        answer = self._shape(visit, job, body, model).response(choices, usage)
        visit.leave(Outcome.OK)
        brownout = usage["brownout"]
        told = {
            LEVEL_HEADER: str(brownout["level_peak"]),
            SHARE_HEADER: f"{brownout['dimmed_share']:.4f}",
            SETTING_HEADER: str(brownout["setting_version"]),
        }
        return json_response(answer, headers={**headers, **told})

    async def _streamed(
        self, visit: Visit, job: Job, body: GenerationBody, model: ServedModel, headers: Mapping[str, str]
    ) -> Response:
        outputs = self._outputs(visit, job, model)
        try:
            first = await anext(outputs)  # a refusal still gets its own HTTP status
        except BaseException:
            await outputs.aclose()
            raise

        async def all_outputs() -> AsyncGenerator[tuple[int, RequestOutput], None]:
            yield first
            async for item in outputs:
                yield item

        async def end(outcome: Outcome) -> None:
            await outputs.aclose()
            visit.note_answer(choices, job.num_choices_per_prompt)
            visit.leave(outcome)  # unless the stream has said how it ended

        def on_outcome(outcome: Outcome) -> None:
            visit.note_answer(choices, job.num_choices_per_prompt)
            visit.leave(outcome)

        choices = _choices(job)
        events = sse_events(
            all_outputs(),
            self._shape(visit, job, body, model),
            choices,
            job.num_choices_per_prompt,
            _usage_events(body.stream_options),
            on_outcome,
        )
        return EventStreamResponse(events, headers, end, self._service.stalls)

    async def _outputs(
        self, visit: Visit, job: Job, model: ServedModel
    ) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        outputs = generate_all(
            model.backend,
            job.requests,
            visit.counted_from_s,
            self._service.config.idle_timeout_s,
            job.num_choices_per_prompt,
            visit.arrived_s + self._service.config.max_stream_s,
        )
        try:
            async with aclosing(without_answer(outputs) if job.echo_only else outputs) as items:
                async for item in items:
                    visit.note_output()
                    yield item
        except InvalidRequestError as error:
            if error.param != "grammar":
                raise
            raise InvalidRequestError(f"{job.grammar_param}: {error.message}", job.grammar_param) from error

    def _shape(self, visit: Visit, job: Job, body: GenerationBody, model: ServedModel) -> Endpoint:
        return self.route.endpoint(
            response_id=self.route.id_prefix + visit.request_id,
            model=model.name,
            created_s=int(time.time()),
            tokens=model.tokenizer,
            prefix_texts=job.echo_texts,
            service_tier=body.service_tier,
            shows_ids=bool(body.return_token_ids),
            names_by_id=bool(body.return_tokens_as_token_ids),
            shows_prompt_logprobs=body.prompt_logprobs is not None,
        )

    def _ignored(self, body: GenerationBody) -> dict[str, str]:
        """A header with the names of fields that nobody reads, counted in /metrics as well."""
        names = [name[:MAX_NAME_CHARACTERS] for name in body.unknown_fields]
        self._service.counter.count_unknown_fields(self.route.name, names)
        return {IGNORED_HEADER: ", ".join(map(quote, names[:MAX_IGNORED_NAMED]))} if names else {}


async def admitted(
    admission: Admission, visit: Visit, model: ServedModel, info: ModelInfo, job: Job, headers: Mapping[str, str]
) -> tuple[Job, Permit]:
    """The job once it may go to the engines. Priorities order a tenant's own queue; the engines see none of them."""
    permit = await admission.admit(
        visit.tenant,
        model.name,
        model.backend.num_replicas,
        info.max_num_seqs,
        job.requests,
        job.num_choices_per_prompt,
        visit.arrived_s,
        max_wait_s(headers),
    )
    visit.take(permit)
    requests = tuple(replace(request, priority=0) if request.priority else request for request in job.requests)
    return replace(job, requests=requests), permit


def max_wait_s(headers: Mapping[str, str]) -> float | None:
    """How long the client is ready to wait for a place, if it says so. Raises ApiError."""
    given = headers.get(MAX_WAIT_HEADER)
    if given is None:
        return None
    if not (given.isascii() and given.isdigit() and 0 < int(given) < 10**9):
        raise ApiError(Outcome.INVALID, f"{MAX_WAIT_HEADER} must be a number of milliseconds", MAX_WAIT_HEADER)
    return int(given) / 1000


def _choices(job: Job) -> list[Choice]:
    return [
        Choice(index, request.prompt_ids, ToolCallParser() if job.parses_tools else None)
        for index, request in enumerate(job.requests)
    ]


def _usage_events(options: StreamOptions | None) -> UsageEvents:
    if options is None:
        return UsageEvents()
    return UsageEvents(at_end=bool(options.include_usage), continuous=bool(options.continuous_usage_stats))
