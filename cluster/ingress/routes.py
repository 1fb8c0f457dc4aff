"""The ASGI application: the endpoint groups, put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from cluster.ingress import generation, operations, tokens
from cluster.ingress.errors import json_response
from cluster.ingress.openapi import document
from cluster.ingress.service import OpenAIService

API_VERSION = "1"  # of the paths under /v1


def create_api(service: OpenAIService) -> FastAPI:
    """All routes of one ingress replica."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.gather(*(model.backend.start() for model in service.models.values()))
        yield

    api = FastAPI(title="BrownoutServe", version=API_VERSION, docs_url=None, redoc_url=None, lifespan=lifespan)
    api.openapi = cache(lambda: document(api.title, api.version))  # type: ignore[method-assign]
    for group in (generation, tokens, operations):
        group.add_routes(api, service)
    if origins := service.config.allowed_origins:
        api.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=["*"]
        )

    @api.exception_handler(HTTPException)
    async def unknown_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
        headers = {name.lower(): value for name, value in (error.headers or {}).items()}
        if error.status_code == 405:  # each method is a route of its own, and only the first one is named
            here = [route for route in api.routes if isinstance(route, APIRoute) and _is_at(route, request)]
            headers["allow"] = ", ".join(sorted({method for route in here for method in route.methods or ()}))
        return json_response(body, error.status_code, headers)

    return api


def _is_at(route: APIRoute, request: Request) -> bool:
    return route.path_regex.match(request.url.path) is not None
