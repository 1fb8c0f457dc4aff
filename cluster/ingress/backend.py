"""The engines as the ingress sees them: generate on one, ask all. The only part of the ingress that knows Serve."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any, Protocol

import grpc
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.ingress.errors import DEFAULT_RETRY_AFTER_S, ApiError, Outcome
from cluster.reports import ReplicaReport
from engine.types import EngineDeadError, GenerationRequest, ModelInfo, RequestOutput

ASK_TIMEOUT_S = 5.0  # for a question to a replica that takes it no time to answer

logger = logging.getLogger(__name__)


class ReplicaLostError(Exception):
    """The replica died, or was cut off, while it served a request."""


class Backend(Protocol):
    """What the API is served from."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestOutput, None]:
        """Outputs until a finish_reason; closing it aborts the request.

        Raises ReplicaLostError, ApiError, InvalidRequestError or EngineBusyError.
        """
        ...

    async def info(self) -> ModelInfo:
        """What is served. ApiError (unavailable) while no replica is up."""
        ...

    async def reports(self) -> list[ReplicaReport]:
        """Of every replica that answers; empty when none does."""
        ...


class ServeBackend:
    """The replicas behind a Serve handle."""

    def __init__(self, engines: DeploymentHandle) -> None:
        self._engines = engines
        self._generate: Any = engines.options(stream=True).generate
        self._info: ModelInfo | None = None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestOutput, None]:
        response = self._generate.remote(request)
        try:
            async for item in response:
                if isinstance(item, EngineDeadError):
                    raise ReplicaLostError(str(item)) from item
                if isinstance(item, Exception):
                    raise item
                yield item
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise _unavailable() from error
        except (RayError, RayServeException, grpc.RpcError) as error:
            logger.warning("request %s lost its replica: %s", request.request_id, type(error).__name__)
            raise ReplicaLostError(f"the replica that served the request was lost ({type(error).__name__})") from error
        finally:
            response.cancel()

    async def info(self) -> ModelInfo:
        if self._info is None:
            try:
                async with asyncio.timeout(ASK_TIMEOUT_S):
                    self._info = await self._engines.info.remote()
            except (TimeoutError, RayError, RayServeException, grpc.RpcError) as error:
                raise _unavailable() from error
        return self._info

    async def reports(self) -> list[ReplicaReport]:
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                # Each by itself: the public results_async() gives all answers or, if one replica hangs, none.
                pending = await self._engines.broadcast("report")._fetch_replica_results_async()
        except (TimeoutError, RayError, RayServeException, grpc.RpcError):
            return []
        answers = await asyncio.gather(
            *(asyncio.wait_for(result.get_async(), ASK_TIMEOUT_S) for result in pending), return_exceptions=True
        )
        reports = [answer for answer in answers if isinstance(answer, ReplicaReport)]
        return sorted(reports, key=lambda report: report.replica_id)


def _unavailable() -> ApiError:
    return ApiError(Outcome.UNAVAILABLE, "no engine replica is ready", retry_after_s=DEFAULT_RETRY_AFTER_S)
