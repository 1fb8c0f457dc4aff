"""What all endpoints of one ingress replica share, whatever the engines behind it are."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from cluster.admission.config import AdmissionSection
from cluster.admission.tenants import Tenant
from cluster.ingress.admin import BrownoutAdmin
from cluster.ingress.admission import Admission
from cluster.ingress.auth import Access, Authenticator
from cluster.ingress.backend import Backend
from cluster.ingress.config import IngressSection
from cluster.ingress.errors import ApiError, Outcome, error_response, to_api_error
from cluster.ingress.limits import BodyLimit, ConcurrencyLimit, check_headers
from cluster.ingress.metrics import RequestCounter
from cluster.ingress.stalls import StallWatch
from cluster.ingress.visit import Visit
from cluster.logs import fields
from cluster.reports import ReplicaReport
from engine.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model: its engines, and the tokenizer that they use."""

    name: str
    backend: Backend
    tokenizer: Tokenizer


class OpenAIService:
    """Serves ``models``. ``admin`` steers brownout; without one, the endpoint for it says that there is none.

    ``auth`` names the tenants; without one, everybody is the same. ``admission`` is where they wait; None: nowhere.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        config: IngressSection,
        ingress_id: str,
        admin: BrownoutAdmin | None = None,
        auth: Authenticator | None = None,
        admission: Admission | None = None,
    ) -> None:
        self.models = {model.name: model for model in models}
        self.config = config
        self.ingress_id = ingress_id
        self.admin = admin
        self.auth = auth or Authenticator(AdmissionSection(), None, config.admin_token)
        self.admission = admission
        self.concurrency = ConcurrencyLimit(config.max_concurrent)
        self.counter = RequestCounter()
        self.stalls = StallWatch(config.send_timeout_s)
        self.started_s = int(time.time())
        self._body_limit = BodyLimit(config.max_body_bytes)

    async def answer(
        self,
        request: Request,
        endpoint: str,
        handle: Callable[[Request, Visit], Awaitable[Response]],
        access: Access = Access.TENANT,
    ) -> Response:
        """Give the request a place and a log line, and its failures their HTTP form.

        ``handle`` leaves the visit itself when its answer goes on after it has returned.
        """
        visit = Visit(self.concurrency, self.counter, endpoint, request.headers, self.admission)
        try:
            check_headers(request.headers.raw, self.config.max_header_bytes)
            if access is Access.TENANT:
                visit.tenant = self.auth.tenant(request.headers)
            else:
                self.auth.check(access, request.headers)
            visit.enter()
            return await handle(request, visit)
        except Exception as error:
            failure = to_api_error(error)
            if failure.outcome is Outcome.BROKEN:
                whose = {"request_id": visit.request_id, "trace_id": visit.trace.trace_id}
                logger.exception("request failed", extra=fields(whose))
            visit.leave(failure.outcome)
            return error_response(failure)
        except BaseException:  # cancelled, because the client is gone
            visit.leave(Outcome.DISCONNECTED)
            raise

    async def read_body(self, request: Request) -> bytes:
        """Raises ApiError when it is larger, or takes longer to come, than allowed."""
        self._body_limit.check_declared(request.headers.get("content-length"))
        body = bytearray()
        try:
            async with asyncio.timeout(self.config.body_timeout_s):
                async for chunk in request.stream():
                    body += chunk
                    self._body_limit.check_received(len(body))
        except TimeoutError as error:
            message = f"the request body has not come within {self.config.body_timeout_s:g} s"
            raise ApiError(Outcome.SLOW_BODY, message) from error
        except ClientDisconnect as error:
            raise ApiError(Outcome.DISCONNECTED, "the client went away") from error
        return bytes(body)

    def models_of(self, tenant: Tenant) -> list[ServedModel]:
        """Those that the tenant may use."""
        return [model for model in self.models.values() if tenant.limits.may_use(model.name)]

    def model(self, name: str | None, tenant: Tenant) -> ServedModel:
        """The model of that name, the tenant's first one if none is given. Raises ApiError (not found, forbidden)."""
        if name is None:
            return self.models_of(tenant)[0]
        if name not in self.models:
            known = ", ".join(repr(model.name) for model in self.models_of(tenant))
            raise ApiError(Outcome.NOT_FOUND, f"the model {name!r} does not exist; this server has {known}", "model")
        if not tenant.limits.may_use(name):
            raise ApiError(Outcome.MODEL_FORBIDDEN, f"the API key's tenant may not use the model {name!r}", "model")
        return self.models[name]

    async def reports(self) -> list[ReplicaReport]:
        """Of every replica of every model that answers."""
        of_models = await asyncio.gather(*(model.backend.reports() for model in self.models.values()))
        return [report for reports in of_models for report in reports]
