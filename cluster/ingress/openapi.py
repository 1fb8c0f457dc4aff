"""The OpenAPI document, from the same schemas that read the requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from cluster.ingress.admin import PolicyBody
from cluster.ingress.openai import answers
from cluster.ingress.openai.chat_schemas import ChatBody
from cluster.ingress.openai.schemas import CompletionBody
from cluster.ingress.tokens import DetokenizeBody, TokenizeBody

REFS = "#/components/schemas/{model}"
SHED = {"retry-after": {"schema": {"type": "string"}, "description": "Seconds after which to try again."}}

# Chunks as JSON, then "[DONE]".
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}


@dataclass(frozen=True, slots=True)
class Operation:
    method: str
    path: str
    summary: str
    answer: type[BaseModel] | None  # None: plain text
    body: type[BaseModel] | None = None
    refusals: tuple[int, ...] = ()
    streams: bool = False


POSTED = (400, 401, 403, 404, 408, 413, 422, 429, 431, 500, 503)
UNKNOWN_KEY = (401, 503)
OPERATIONS = (
    Operation("post", "/v1/chat/completions", "Chat", answers.ChatCompletion, ChatBody, POSTED, streams=True),
    Operation("post", "/v1/completions", "Complete text", answers.Completion, CompletionBody, POSTED, streams=True),
    Operation("post", "/tokenize", "Tokens of a prompt or conversation", answers.Tokens, TokenizeBody, POSTED),
    Operation("post", "/detokenize", "Text of tokens", answers.Prompt, DetokenizeBody, POSTED),
    Operation("get", "/v1/models", "Models", answers.ModelList, refusals=UNKNOWN_KEY),
    Operation("get", "/v1/models/{name}", "One model", answers.Model, refusals=(403, 404, *UNKNOWN_KEY)),
    Operation("get", "/v1/brownout", "Policy and what it does", answers.BrownoutStatus, refusals=(403, 431, 500, 503)),
    Operation("put", "/v1/brownout", "Pin brownout", answers.BrownoutStatus, PolicyBody, POSTED),
    Operation("get", "/health", "Liveness", answers.Liveness),
    Operation("get", "/ready", "Readiness", answers.Readiness),
    Operation("get", "/ping", "Liveness", answers.Liveness),
    Operation("get", "/version", "Version", answers.Version),
    Operation("get", "/load", "Requests served now", answers.ServerLoad, refusals=(403,)),
    Operation("get", "/metrics", "Metrics in Prometheus' text format", None, refusals=(403,)),
)


def document(title: str, version: str) -> dict[str, Any]:
    """OpenAPI 3.1, of all routes."""
    models: list[type[BaseModel]] = [answers.ErrorAnswer]
    models += [model for o in OPERATIONS for model in (o.body, o.answer) if model is not None]
    refs, schemas = models_json_schema([(model, "validation") for model in models], ref_template=REFS)
    schema_of = {model: ref for (model, _), ref in refs.items()}
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _describe(operation, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "paths": paths,
        "components": {"schemas": schemas.get("$defs", {})},
    }


def _describe(operation: Operation, schema_of: dict[Any, Any]) -> dict[str, Any]:
    described: dict[str, Any] = {"summary": operation.summary, "operationId": _operation_id(operation)}
    if "{name}" in operation.path:
        described["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": _json(schema_of[operation.body])}
    content: dict[str, Any] = {"text/plain": {}} if operation.answer is None else _json(schema_of[operation.answer])
    if operation.streams:
        content["text/event-stream"] = {"schema": EVENT}
    responses: dict[str, Any] = {"200": {"description": operation.summary, "content": content}}
    if operation.answer is answers.Readiness:
        responses["503"] = {"description": "No replica answers", "content": content}
    for status in operation.refusals:
        responses[str(status)] = {"description": "Refused", "content": _json(schema_of[answers.ErrorAnswer])}
        if status in (429, 503):
            responses[str(status)]["headers"] = SHED
    described["responses"] = responses
    return described


def _operation_id(operation: Operation) -> str:
    return operation.method + operation.path.translate(str.maketrans("/{}", "___"))


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
