"""The engine deployment: one replica hosts one engine, reports to the controller and publishes its load."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray import serve
from ray.util import get_node_ip_address

from cluster.config import ClusterConfig
from cluster.controller_host import ControllerLocator
from cluster.local.processes import process_age_s
from cluster.logs import configure as configure_logging
from cluster.reports import ReplicaReport, SwapReport
from cluster.router.arrivals import ArrivalRate
from cluster.router.loads import LoadPublisher, router_group
from cluster.router.policy import ARRIVALS_S, ReplicaLoad
from cluster.transport.server import ChannelServer
from controller.config import StreamSecurity
from controller.security import read_token
from engine.agent import ControlCredentials, TelemetryAgent
from engine.async_engine import AsyncEngine
from engine.config import ConfigError
from engine.level_log import LevelChange
from engine.request_log import RequestRecord
from engine.types import ModelInfo
from engine.weights.manifest import CheckpointError

logger = logging.getLogger(__name__)

CONTROLLER_TIMEOUT_S = 10.0
SWITCH_INTERVAL_S = 0.001  # of Python threads: a token must not wait 5 ms for the engine's next step to be prepared


class EngineReplica:
    """Serves one model on one device. Made ready by its constructor: Serve routes to it only after that."""

    async def __init__(self, config: ClusterConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        configure_logging(config.log_format)
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
            credentials=control_credentials(config.controller.security),
            start_s=process_age_s(),
        )
        self._arrivals = ArrivalRate(ARRIVALS_S)
        self._publisher = LoadPublisher(
            config.resolved_redis_url(),
            router_group(context.app_name, context.deployment),
            self._replica_id,
            self._live_load,
        )
        self._max_num_batched_tokens = config.scheduler.max_num_batched_tokens
        self._drain_timeout_s = config.drain_timeout_s
        self._token = secrets.token_hex(16)
        self._server = ChannelServer(self._engine, self._token)
        self._address = await self._server.start(get_node_ip_address())
        await self._agent.start()
        self._publisher.start()
        gc.freeze()  # what has been loaded stays: the collector need not walk over it, 50 ms each time
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        logger.info("replica %s serves %s", self._replica_id, self._engine.info)

    async def info(self) -> ModelInfo:
        return self._engine.info

    async def report(self) -> ReplicaReport:
        """Raises EngineDeadError: a replica that cannot serve does not say that it does."""
        self._engine.check_health()
        return ReplicaReport(
            self._replica_id,
            os.getpid(),
            self._engine.info,
            self._engine.stats(),
            self._engine.totals(),
            self._address,
            self._token,
        )

    async def requests_of(self, request_id: str) -> list[dict[str, Any]]:
        """What became of an API request's choices and attempts here, as far as it is remembered."""
        return self._described(self._engine.request_log.find(request_id))

    async def requests_between(self, since_s: float, until_s: float, limit: int) -> list[dict[str, Any]]:
        """The newest requests that ended in [since_s, until_s), Unix time by this machine's clock."""
        return self._described(self._engine.request_log.between(since_s, until_s, limit))

    async def level_changes(self, since_s: float, until_s: float) -> list[dict[str, Any]]:
        """Those of [since_s, until_s), Unix time by this machine's clock, oldest first."""
        return self._described(self._engine.level_log.between(since_s, until_s))

    async def swap_united(self, path: str, ladder: str = "", replaces: int | None = None) -> SwapReport:
        """Replace united experts while serving; the report says what was refused, if anything."""
        try:
            await self._engine.swap_united(path, ladder, replaces)
        except (ConfigError, CheckpointError, RuntimeError) as error:
            return SwapReport(self._replica_id, str(error))
        return SwapReport(self._replica_id)

    async def check_health(self) -> None:
        """Serve's probe: EngineDeadError has the replica replaced."""
        self._engine.check_health()

    async def __del__(self) -> None:
        """Serve's hook for a replica that it takes down: end in good order, requests first."""
        if not hasattr(self, "_address"):
            return  # it never became ready
        await self._publisher.stop()
        await self._server.drain(self._drain_timeout_s)
        await self._server.stop()
        await self._agent.stop()
        await self._engine.stop()

    def _described(self, records: Sequence[RequestRecord] | Sequence[LevelChange]) -> list[dict[str, Any]]:
        whose = {"replica_id": self._replica_id, "model_id": self._engine.info.name}
        return [{**whose, **asdict(record)} for record in records]

    def _live_load(self, sequence: int) -> ReplicaLoad:
        self._engine.check_health()  # a dead engine publishes no load, so routers turn away from it
        now_s = time.monotonic()
        return ReplicaLoad.of(
            self._engine.stats(),
            self._engine.brownout,
            now_s,
            sequence=sequence,
            max_num_batched_tokens=self._max_num_batched_tokens,
            arrivals_per_s=self._arrivals.update(self._server.num_submitted, now_s),
        )


def control_credentials(security: StreamSecurity) -> ControlCredentials:
    """The replica's side of the control streams' security. OSError if a file cannot be read."""
    return ControlCredentials(
        ca_pem=Path(security.ca_file).read_bytes() if security.has_tls else None,
        token=read_token(security.token_file),
        server_name=security.server_name,
    )


async def _wait_for(controller: asyncio.Task[str]) -> None:
    """A replica that is ready has a controller, so that operators find one; without it, it serves on safe settings."""
    try:
        async with asyncio.timeout(CONTROLLER_TIMEOUT_S):
            await controller
    except Exception as error:
        logger.warning("no controller yet (%r); serving without it", error)
