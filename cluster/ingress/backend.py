"""The engines as the ingress sees them: generate on one, ask all. The only part of the ingress that knows Serve."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

import grpc
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.ingress.errors import DEFAULT_RETRY_AFTER_S, ApiError, Outcome
from cluster.ingress.fleet import Fleet
from cluster.ingress.retry_budget import RetryBudget
from cluster.logs import fields
from cluster.reports import ReplicaReport
from cluster.router.router import Router
from cluster.transport.channel import ReplicaLostError
from cluster.transport.messages import DrainingError
from engine.types import GenerationRequest, ModelInfo, RequestOutput

ASK_TIMEOUT_S = 2.0  # for a question to a replica that takes it no time to answer
START_TIMEOUT_S = 2.0  # engines that run already are found in a fraction of it; those that load take minutes
NO_REPLICA_TIMEOUT_S = 10.0  # the only replica of a model may be restarting

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """What the API is served from."""

    async def start(self) -> None:
        """Get to know the engines before the first request comes; returns soon, also when there are none yet."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestOutput, None]:
        """Outputs until a finish_reason; closing it aborts the request.

        Raises ReplicaLostError, ApiError, InvalidRequestError or EngineBusyError.
        """
        ...

    def num_replicas(self) -> int:
        """Those that take requests."""
        ...

    async def info(self) -> ModelInfo:
        """What is served. ApiError (unavailable) while no replica is up."""
        ...

    async def reports(self) -> list[ReplicaReport]:
        """Of every replica that answers; empty when none does."""
        ...


class ServeBackend:
    """The replicas of one engine deployment: Serve says which there are, the channels carry the requests."""

    def __init__(self, engines: DeploymentHandle, router: Router) -> None:
        self._engines = engines
        self._router = router
        self._fleet = Fleet(self.reports, router.watch, router.forget)
        self._retries = RetryBudget(time.monotonic())

    async def start(self) -> None:
        await self._fleet.wait_for_replica(START_TIMEOUT_S)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestOutput, None]:
        self._retries.earn(time.monotonic())
        while True:
            if not self._fleet.channels() and not await self._fleet.wait_for_replica(NO_REPLICA_TIMEOUT_S):
                raise _unavailable()
            await self._router.wait_for_loads(tuple(self._fleet.channels()))
            channels = self._fleet.channels()
            if not channels:
                continue
            channel = channels[self._router.pick(request, {name: c.num_open for name, c in channels.items()})]
            try:
                async with aclosing(channel.generate(request)) as outputs:
                    async for output in outputs:
                        yield output
                return
            except DrainingError:  # it has not begun there, so this is no retry
                self._fleet.retire(channel)
            except ReplicaLostError as error:
                lost = {**request.log_fields, "replica_id": channel.replica_id, "reason": str(error)}
                logger.warning("replica lost", extra=fields(lost))
                self._fleet.retire(channel)
                raise ReplicaLostError(str(error), may_retry=self._retries.spend(time.monotonic())) from error

    def num_replicas(self) -> int:
        return len(self._fleet.channels())

    async def info(self) -> ModelInfo:
        if self._fleet.info is None:
            await self._fleet.wait_for_replica(NO_REPLICA_TIMEOUT_S)
        if self._fleet.info is None:
            raise _unavailable()
        return self._fleet.info

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
