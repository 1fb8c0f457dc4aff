"""Every way in which the API refuses or fails, with its HTTP code and its OpenAI-style body."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

from fastapi import Response

from cluster.ingress.lingering import LingeringResponse
from engine.types import EngineBusyError, EngineDeadError, InvalidRequestError

DEFAULT_RETRY_AFTER_S = 1.0


class Outcome(Enum):
    """How a request ended: the label in /metrics, the HTTP status, OpenAI's error type and code."""

    OK = ("ok", 200, "", None)
    INVALID = ("invalid", 400, "invalid_request_error", None)
    CONTEXT_LENGTH = ("context_length", 400, "invalid_request_error", "context_length_exceeded")
    UNAUTHORIZED = ("unauthorized", 401, "invalid_request_error", "invalid_api_key")
    FORBIDDEN = ("forbidden", 403, "permission_error", "forbidden")
    MODEL_FORBIDDEN = ("model_forbidden", 403, "permission_error", "model_not_allowed")
    NOT_FOUND = ("not_found", 404, "invalid_request_error", "model_not_found")
    SLOW_BODY = ("slow_body", 408, "invalid_request_error", "request_timeout")
    TOO_LARGE = ("too_large", 413, "invalid_request_error", "request_too_large")
    HEADERS_TOO_LARGE = ("headers_too_large", 431, "invalid_request_error", "headers_too_large")
    OVER_BUDGET = ("over_budget", 422, "invalid_request_error", "tokens_exceed_budget")  # however long it waits
    RATE_REQUESTS = ("rate_requests", 429, "requests", "rate_limit_exceeded")
    RATE_TOKENS = ("rate_tokens", 429, "tokens", "rate_limit_exceeded")
    QUEUE_FULL = ("queue_full", 429, "requests", "concurrency_limit_exceeded")
    SHED = ("shed", 503, "overloaded_error", "shed")
    QUEUE_TIMEOUT = ("queue_timeout", 503, "overloaded_error", "queue_timeout")
    BUSY = ("busy", 503, "overloaded_error", "overloaded")
    UNAVAILABLE = ("unavailable", 503, "overloaded_error", "no_replica")
    REPLICA_LOST = ("replica_lost", 500, "server_error", "replica_lost")
    TIMEOUT = ("timeout", 500, "server_error", "timeout")
    BROKEN = ("broken", 500, "server_error", "internal_error")
    STALLED = ("stalled", 499, "", None)  # the client took nothing of its stream
    DISCONNECTED = ("disconnected", 499, "", None)  # the client went away; nobody reads the status

    def __init__(self, label: str, status: int, error_type: str, code: str | None) -> None:
        self.label = label
        self.status = status
        self.error_type = error_type
        self.code = code


class ApiError(Exception):
    """A refusal or a failure on its way to the client. ``param`` names the offending field."""

    def __init__(
        self,
        outcome: Outcome,
        message: str,
        param: str | None = None,
        retry_after_s: float | None = None,
        more_headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.outcome = outcome
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.more_headers = more_headers or {}

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.outcome.error_type,
                "param": self.param,
                "code": self.outcome.code,
            }
        }

    def headers(self) -> dict[str, str]:
        """Retry-After in whole seconds, rounded up, on busy answers only."""
        headers = dict(self.more_headers)
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.outcome is Outcome.UNAUTHORIZED:
            headers["www-authenticate"] = "Bearer"
        if self.interrupts_body:
            headers["connection"] = "close"  # nobody will read the rest of the body
        return headers

    @property
    def interrupts_body(self) -> bool:
        """Whether the client is probably still sending."""
        return self.outcome in (Outcome.SLOW_BODY, Outcome.TOO_LARGE)


def to_api_error(error: Exception) -> ApiError:
    """The engine's exceptions and unforeseen ones, as the client shall see them."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequestError):
        return ApiError(Outcome.INVALID, error.message, error.param)
    if isinstance(error, EngineBusyError):
        return ApiError(Outcome.BUSY, error.message, retry_after_s=error.retry_after_s)
    if isinstance(error, EngineDeadError):
        return ApiError(Outcome.REPLICA_LOST, str(error))
    return ApiError(Outcome.BROKEN, "the server failed to process the request")


def json_response(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None, kind: type[Response] = Response
) -> Response:
    """ASCII JSON: whatever text a client sent, its echo in a message can be encoded."""
    return kind(json.dumps(content), status, dict(headers or {}), media_type="application/json")


def error_response(error: ApiError) -> Response:
    kind = LingeringResponse if error.interrupts_body else Response
    return json_response(error.body(), error.outcome.status, error.headers(), kind)
