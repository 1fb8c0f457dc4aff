"""What all endpoints of one ingress replica share, whatever the engines behind it are."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from fastapi import Request, Response

from cluster.config import IngressSection
from cluster.ingress.admin import BrownoutAdmin
from cluster.ingress.backend import Backend
from cluster.ingress.errors import ApiError, Outcome, error_response, to_api_error
from cluster.ingress.limits import BodyLimit, ConcurrencyLimit
from cluster.ingress.metrics import RequestCounter
from cluster.ingress.visit import Visit
from cluster.reports import ReplicaReport
from engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model: its engines, and the tokenizer that they use."""

    name: str
    backend: Backend
    tokenizer: Tokenizer


class OpenAIService:
    """Serves ``models``. ``admin`` steers brownout; without one, the endpoint for it says that there is none."""

    def __init__(
        self,
        models: Sequence[ServedModel],
        config: IngressSection,
        ingress_id: str,
        admin: BrownoutAdmin | None = None,
    ) -> None:
        self.models = {model.name: model for model in models}
        self.config = config
        self.ingress_id = ingress_id
        self.admin = admin
        self.concurrency = ConcurrencyLimit(config.max_concurrent)
        self.counter = RequestCounter()
        self.started_s = int(time.time())
        self._body_limit = BodyLimit(config.max_body_bytes)

    async def answer(
        self, request: Request, endpoint: str, handle: Callable[[Request, Visit], Awaitable[Response]]
    ) -> Response:
        """Give the request a place and a log line, and its failures their HTTP form.

        ``handle`` leaves the visit itself when its answer goes on after it has returned.
        """
        visit = Visit(self.concurrency, self.counter, endpoint, request.headers)
        try:
            visit.enter()
            return await handle(request, visit)
        except Exception as error:
            failure = to_api_error(error)
            if failure.outcome is Outcome.BROKEN:
                logger.exception("request %s failed", visit.request_id)
            visit.leave(failure.outcome)
            return error_response(failure)
        except BaseException:  # cancelled, because the client is gone
            visit.leave(Outcome.DISCONNECTED)
            raise

    async def read_body(self, request: Request) -> bytes:
        """Raises ApiError when it is larger than allowed."""
        self._body_limit.check_declared(request.headers.get("content-length"))
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            self._body_limit.check_received(len(body))
        return bytes(body)

    def model(self, name: str | None) -> ServedModel:
        """The model of that name, the first one if none is given. Raises ApiError (not found)."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            known = ", ".join(map(repr, self.models))
            raise ApiError(Outcome.NOT_FOUND, f"the model {name!r} does not exist; this server has {known}", "model")
        return self.models[name]

    async def reports(self) -> list[ReplicaReport]:
        """Of every replica of every model that answers."""
        of_models = await asyncio.gather(*(model.backend.reports() for model in self.models.values()))
        return [report for reports in of_models for report in reports]
