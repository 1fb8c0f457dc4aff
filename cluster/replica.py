"""The engine deployment: one replica hosts one engine, reports to the controller and publishes its load."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing

from ray import serve

from cluster.config import ClusterConfig
from cluster.controller_host import ControllerLocator
from cluster.reports import ReplicaReport
from cluster.router.loads import LoadPublisher
from engine.agent import TelemetryAgent
from engine.async_engine import AsyncEngine
from engine.types import (
    EngineBusyError,
    EngineDeadError,
    EngineStats,
    GenerationRequest,
    InvalidRequestError,
    ModelInfo,
    RequestOutput,
)

logger = logging.getLogger(__name__)

CONTROLLER_TIMEOUT_S = 10.0
REFUSALS = (InvalidRequestError, EngineBusyError, EngineDeadError)


class EngineReplica:
    """Serves one model on one device. Made ready by its constructor: Serve routes to it only after that."""

    async def __init__(self, config: ClusterConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        context = serve.get_replica_context()
        self._replica_id = context.replica_id.unique_id
        locator = ControllerLocator(config, context.app_name)
        controller = asyncio.create_task(locator.address())  # its process starts while the model loads
        self._engine = await AsyncEngine.start(config.engine_config())
        await _wait_for(controller)
        self._agent = TelemetryAgent(
            address_provider=locator.address,
            replica_id=self._replica_id,
            model_info=self._engine.info,
            on_setting=self._engine.apply_setting,
            take_window=self._engine.take_window,
            period_s=config.controller.tick_s,
        )
        self._publisher = LoadPublisher(
            config.resolved_redis_url(),
            context.app_name,
            self._replica_id,
            self._live_stats,
            config.scheduler.max_num_batched_tokens,
        )
        await self._agent.start()
        self._publisher.start()
        logger.info("replica %s serves %s", self._replica_id, self._engine.info)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestOutput | Exception, None]:
        """Outputs of one request until its finish_reason; cancelling it aborts the request.

        The engine's refusals are yielded, not raised: so they arrive as they are whatever Serve's transport does.
        """
        try:
            async with aclosing(self._engine.generate(request)) as outputs:
                async for output in outputs:
                    yield output
        except REFUSALS as error:
            yield error

    async def info(self) -> ModelInfo:
        return self._engine.info

    async def report(self) -> ReplicaReport:
        return ReplicaReport(
            self._replica_id, os.getpid(), self._engine.info, self._engine.stats(), self._engine.totals()
        )

    async def check_health(self) -> None:
        """Serve's probe: EngineDeadError has the replica replaced."""
        self._engine.check_health()

    def _live_stats(self) -> EngineStats:
        self._engine.check_health()  # a dead engine publishes no load, so routers turn away from it
        return self._engine.stats()


async def _wait_for(controller: asyncio.Task[str]) -> None:
    """A replica that is ready has a controller, so that operators find one; without it, it serves on safe settings."""
    try:
        async with asyncio.timeout(CONTROLLER_TIMEOUT_S):
            await controller
    except Exception as error:
        logger.warning("no controller yet (%r); serving without it", error)
