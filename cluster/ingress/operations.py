"""What operators and their machines ask: is it alive, how loaded is it, which models are there, how are they dimmed.

/ping, /version and /load are as in vLLM.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from fastapi import FastAPI, Request, Response

from cluster.ingress.admin import BrownoutAdmin, PolicyBody, shown
from cluster.ingress.auth import Access
from cluster.ingress.errors import ApiError, Outcome, error_response, json_response
from cluster.ingress.metrics import render
from cluster.ingress.openai.schemas import parse_body
from cluster.ingress.service import OpenAIService, ServedModel
from cluster.ingress.visit import Visit
from cluster.version import VERSION

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def add_routes(api: FastAPI, service: OpenAIService) -> None:
    @api.api_route("/health", methods=["GET", "HEAD"])
    @api.api_route("/ping", methods=["GET", "HEAD", "POST"])
    async def health() -> Response:
        """Liveness: 200 as long as this process answers."""
        return json_response({"status": "ok"})

    @api.get("/version")
    async def version() -> Response:
        return json_response({"version": VERSION})

    @api.get("/load")
    async def load(request: Request) -> Response:
        """API requests that this ingress serves now."""
        try:
            service.auth.check(Access.OPERATOR, request.headers)
        except ApiError as error:
            return error_response(error)
        return json_response({"server_load": service.concurrency.num_held})

    @api.api_route("/ready", methods=["GET", "HEAD"])
    async def ready() -> Response:
        """200 while at least one engine replica answers."""
        answering = Counter(report.info.name for report in await service.reports())
        # None may answer in the moment in which the replicas change, while requests go where channels are open.
        models = {name: answering[name] or model.backend.num_replicas() for name, model in service.models.items()}
        num_replicas = sum(models.values())
        status = "ok" if num_replicas else "unavailable"
        return json_response(
            {"status": status, "replicas": num_replicas, "models": models}, 200 if num_replicas else 503
        )

    @api.get("/metrics")
    async def metrics(request: Request) -> Response:
        try:
            service.auth.check(Access.OPERATOR, request.headers)
        except ApiError as error:
            return error_response(error)
        reports = await service.reports()
        page = render(reports, service.counter, service.concurrency.num_held, service.ingress_id, service.admission)
        return Response(page, media_type=METRICS_TYPE)

    @api.get("/v1/models")
    async def models(request: Request) -> Response:
        try:
            usable = service.models_of(service.auth.tenant(request.headers))
        except ApiError as error:
            return error_response(error)
        described = (_model_object(service, model) for model in usable)
        return json_response({"object": "list", "data": await asyncio.gather(*described)})

    @api.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        try:
            served = service.model(name, service.auth.tenant(request.headers))
        except ApiError as error:
            return error_response(error)
        return json_response(await _model_object(service, served))

    async def read_brownout(request: Request, visit: Visit) -> Response:
        status = await _admin(service).status()
        visit.leave(Outcome.OK)
        return json_response(shown(status))

    async def set_brownout(request: Request, visit: Visit) -> Response:
        body = parse_body(PolicyBody, await service.read_body(request))
        await _admin(service).set_policy(body.law, body.level, body.model)
        return await read_brownout(request, visit)

    @api.get("/v1/brownout")
    async def brownout(request: Request) -> Response:
        return await service.answer(request, "brownout", read_brownout, Access.OPERATOR)

    @api.put("/v1/brownout")
    async def pin(request: Request) -> Response:
        return await service.answer(request, "brownout", set_brownout, Access.ADMIN)


def _admin(service: OpenAIService) -> BrownoutAdmin:
    if service.admin is None:
        raise ApiError(Outcome.UNAVAILABLE, "this server has no controller")
    return service.admin


async def _model_object(service: OpenAIService, model: ServedModel) -> dict[str, object]:
    described: dict[str, object] = {
        "id": model.name,
        "object": "model",
        "created": service.started_s,
        "owned_by": "brownoutserve",
    }
    try:
        info = await model.backend.info()
    except ApiError:  # known by name even while no replica is up
        return described
    levels = {"num_levels": info.num_levels, "ladder_measured": info.ladder_measured}
    return {**described, "max_model_len": info.max_model_len, "brownout": levels}
