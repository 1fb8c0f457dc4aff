"""The OpenAI API over HTTP: what each route does with a request, from the first byte of its body to the last event."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from cluster.config import IngressSection
from cluster.ingress.backend import Backend
from cluster.ingress.errors import ApiError, Outcome, error_response, json_response, to_api_error
from cluster.ingress.jobs import Job, make_job, take_request_id
from cluster.ingress.limits import BodyLimit, ConcurrencyLimit
from cluster.ingress.metrics import RequestCounter, render
from cluster.ingress.responses import ChatEndpoint, Choice, CompletionEndpoint, Endpoint, usage_object
from cluster.ingress.schemas import ChatBody, CompletionBody, GenerationBody, parse_body
from cluster.ingress.stream import EventStreamResponse, generate_all, sse_events
from engine.tokenizer import Tokenizer
from engine.types import RequestOutput

LEVEL_HEADER = "x-brownout-level"
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Route:
    """One generating route: its body, its answers' shape, the prefix of its response ids."""

    name: str
    body: type[GenerationBody]
    endpoint: type[Endpoint]
    id_prefix: str


CHAT = Route("chat_completions", ChatBody, ChatEndpoint, "chatcmpl-")
COMPLETIONS = Route("completions", CompletionBody, CompletionEndpoint, "cmpl-")


class OpenAIService:
    """One ingress replica's state and behaviour, whatever the engines behind it are."""

    def __init__(
        self, backend: Backend, tokenizer: Tokenizer, model_name: str, config: IngressSection, ingress_id: str
    ) -> None:
        self._backend = backend
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._config = config
        self._ingress_id = ingress_id
        self._body_limit = BodyLimit(config.max_body_bytes)
        self._concurrency = ConcurrencyLimit(config.max_concurrent)
        self._counter = RequestCounter()
        self._started_s = int(time.time())

    async def generate(self, request: Request, route: Route) -> Response:
        """POST /v1/chat/completions and /v1/completions."""
        visit = _Visit(self._concurrency, self._counter, route, take_request_id(request.headers))
        try:
            visit.enter()
            body = parse_body(route.body, await self._read_body(request))
            self._check_model(body.model)
            info = await self._backend.info()
            job = await make_job(body, request.headers, visit.request_id, info, self._tokenizer)
            if body.stream:
                return await self._streamed(visit, job, body.include_usage)
            return await self._whole(visit, job)
        except Exception as error:
            failure = to_api_error(error)
            if failure.outcome is Outcome.BROKEN:
                logger.exception("request %s failed", visit.request_id)
            visit.leave(failure.outcome)
            return error_response(failure)
        except BaseException:  # cancelled, because the client is gone
            visit.leave(Outcome.DISCONNECTED)
            raise

    async def models(self) -> Response:
        """GET /v1/models"""
        return json_response({"object": "list", "data": [await self._model_object()]})

    async def model(self, name: str) -> Response:
        """GET /v1/models/{name}"""
        try:
            self._check_model(name)
        except ApiError as error:
            return error_response(error)
        return json_response(await self._model_object())

    async def health(self) -> Response:
        """GET /health: 200 while at least one replica answers."""
        num_replicas = len(await self._backend.reports())
        status = "ok" if num_replicas else "unavailable"
        return json_response({"status": status, "replicas": num_replicas}, 200 if num_replicas else 503)

    async def metrics(self) -> Response:
        """GET /metrics"""
        page = render(await self._backend.reports(), self._counter, self._concurrency.num_held, self._ingress_id)
        return Response(page, media_type=METRICS_TYPE)

    async def _read_body(self, request: Request) -> bytes:
        self._body_limit.check_declared(request.headers.get("content-length"))
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            self._body_limit.check_received(len(body))
        return bytes(body)

    def _check_model(self, name: str) -> None:
        if name != self._model_name:
            raise ApiError(
                Outcome.NOT_FOUND, f"the model {name!r} does not exist; this server has {self._model_name!r}", "model"
            )

    async def _model_object(self) -> dict[str, object]:
        described: dict[str, object] = {
            "id": self._model_name,
            "object": "model",
            "created": self._started_s,
            "owned_by": "brownoutserve",
        }
        try:
            info = await self._backend.info()
        except ApiError:  # known by name even while no replica is up
            return described
        levels = {"num_levels": info.num_levels, "ladder_measured": info.ladder_measured}
        return {**described, "max_model_len": info.max_model_len, "brownout": levels}

    def _outputs(self, visit: _Visit, job: Job) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        return generate_all(self._backend, job.requests, visit.arrived_s, self._config.idle_timeout_s)

    async def _whole(self, visit: _Visit, job: Job) -> Response:
        choices = [Choice(index) for index in range(len(job.requests))]
        async for index, output in self._outputs(visit, job):
            choices[index].take(output)
        usage = usage_object(choices, job.num_choices_per_prompt)
        headers = {LEVEL_HEADER: str(usage["brownout"]["level_peak"])}
        visit.leave(Outcome.OK)
        return json_response(self._endpoint(visit, job).response(choices, usage), headers=headers)

    async def _streamed(self, visit: _Visit, job: Job, include_usage: bool) -> Response:
        outputs = self._outputs(visit, job)
        first = await anext(outputs)  # a refusal still gets its own HTTP status

        async def all_outputs() -> AsyncGenerator[tuple[int, RequestOutput], None]:
            yield first
            async for item in outputs:
                yield item

        async def end() -> None:
            await outputs.aclose()
            visit.leave(Outcome.DISCONNECTED)  # unless the stream has said how it ended

        choices = [Choice(index) for index in range(len(job.requests))]
        endpoint = self._endpoint(visit, job)
        events = sse_events(
            all_outputs(), endpoint, choices, job.num_choices_per_prompt, include_usage, on_outcome=visit.leave
        )
        return EventStreamResponse(events, end)

    def _endpoint(self, visit: _Visit, job: Job) -> Endpoint:
        return visit.route.endpoint(
            response_id=visit.route.id_prefix + visit.request_id,
            model=self._model_name,
            created_s=int(time.time()),
            tokens=self._tokenizer,
            prefix_texts=job.echo_texts,
        )


class _Visit:
    """One request's place in the ingress: taken once, given back once, counted once."""

    def __init__(self, limit: ConcurrencyLimit, counter: RequestCounter, route: Route, request_id: str) -> None:
        self.route = route
        self.request_id = request_id
        self.arrived_s = time.monotonic()
        self._limit = limit
        self._counter = counter
        self._inside = False
        self._counted = False

    def enter(self) -> None:
        """Raises ApiError (busy) when the ingress is full."""
        self._limit.acquire()
        self._inside = True

    def leave(self, outcome: Outcome) -> None:
        """Only the first call counts."""
        if self._inside:
            self._inside = False
            self._limit.release()
        if not self._counted:
            self._counted = True
            self._counter.count(self.route.name, outcome)


def create_api(service: OpenAIService) -> FastAPI:
    """The ASGI application."""
    api = FastAPI(title="BrownoutServe", docs_url=None, redoc_url=None, openapi_url=None)

    @api.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await service.generate(request, CHAT)

    @api.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await service.generate(request, COMPLETIONS)

    @api.get("/v1/models")
    async def models() -> Response:
        return await service.models()

    @api.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return await service.model(name)

    @api.get("/health")
    async def health() -> Response:
        return await service.health()

    @api.get("/metrics")
    async def metrics() -> Response:
        return await service.metrics()

    @api.exception_handler(HTTPException)
    async def unknown_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
        return json_response(body, error.status_code, error.headers)

    return api
