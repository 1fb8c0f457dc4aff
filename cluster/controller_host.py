"""The controller as a named, detached Ray actor: one per application, found by name, restarted by Ray.

Ray re-runs only the constructor of a restarted actor, so the server starts on the first ``address()``: each replica
asks for it before each connection attempt, and Ray holds the call back until the actor is up again.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.util import get_node_ip_address

from cluster.config import ClusterConfig
from controller.config import ControllerConfig
from controller.service import ControllerService

NAMESPACE = "brownoutserve"

logger = logging.getLogger(__name__)


def actor_name(app_name: str) -> str:
    return f"controller:{app_name}"


class ControllerHost:
    """Hosts the ControllerService. All its state is in Redis: killed, it continues where it was."""

    def __init__(self, config: ControllerConfig, redis_url: str) -> None:
        self._config = config
        # The address of whichever node the actor runs on, not of the one that asked for it.
        self._service = ControllerService(replace(config, host=get_node_ip_address()), redis_url)
        self._address: str | None = None
        self._starting = asyncio.Lock()

    async def address(self) -> str:
        """``host:port`` of the control service, started if it is not."""
        async with self._starting:
            if self._address is None:
                self._address = await self._service.start()
        return self._address

    async def config(self) -> ControllerConfig:
        """What it was created with."""
        return self._config

    async def status(self) -> dict[str, Any]:
        await self.address()
        return self._service.status()

    async def set_policy(self, law: str, level: int | None = None, model: str | None = None) -> None:
        """For one model or for all. Raises LawError when the law, its level or the model does not exist."""
        await self.address()
        await self._service.set_policy(law, level, model)

    async def decisions(self, limit: int = 50) -> list[dict[str, Any]]:
        """The newest decisions, newest first."""
        await self.address()
        return self._service.decisions(limit)

    async def decisions_between(self, since_s: float, until_s: float) -> list[dict[str, Any]]:
        """Those of [since_s, until_s), Unix time by the controller's clock, newest first."""
        await self.address()
        return self._service.decisions_between(since_s, until_s)

    async def decisions_of(self, model_id: str, first: int, last: int) -> list[dict[str, Any]]:
        """The settings of a model with versions ``first`` to ``last``, newest first."""
        await self.address()
        return self._service.decisions_of(model_id, first, last)

    async def pid(self) -> int:
        return os.getpid()


class ControllerLocator:
    """Finds the application's controller, creating or replacing it as the configuration demands."""

    def __init__(self, config: ClusterConfig, app_name: str) -> None:
        self._config = config.controller_config(app_name)
        self._redis_url = config.resolved_redis_url()
        self._name = actor_name(app_name)
        self._checked = False

    async def address(self) -> str:
        """Where the replicas' control streams go. Raises RayError when the actor cannot be had now."""
        actor = await asyncio.to_thread(self._get_or_create)
        if not self._checked:
            actor = await self._replace_if_outdated(actor)
            self._checked = True
        address: str = await actor.address.remote()
        return address

    def _get_or_create(self) -> ActorHandle:
        host: Any = ray.remote(ControllerHost)
        actor: ActorHandle = host.options(
            name=self._name,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
        ).remote(self._config, self._redis_url)
        return actor

    async def _replace_if_outdated(self, actor: ActorHandle) -> ActorHandle:
        """Once per replica: a new deployment's first replica ends the controller of the old one.

        Two replicas may do so at once; each kills only the actor whose outdated configuration it has seen.
        """
        running: ControllerConfig = await actor.config.remote()
        if running == self._config:
            return actor
        logger.info("the controller's configuration has changed; replacing it")
        ray.kill(actor, no_restart=True)
        while True:
            actor = await asyncio.to_thread(self._get_or_create)
            try:
                await actor.config.remote()
                return actor
            except RayActorError:  # the name still belongs to the old one
                await asyncio.sleep(0.05)
