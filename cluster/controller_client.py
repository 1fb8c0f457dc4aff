"""The controller actor for callers outside the cluster's event loops: operators, tests, benchmarks."""

from __future__ import annotations

from typing import Any

import ray

from cluster.controller_host import NAMESPACE, actor_name
from cluster.errors import ClusterError

TIMEOUT_S = 30.0  # Ray holds calls back while the actor restarts


class ControllerClient:
    """Needs a process connected to the cluster (``ray.init``). Raises ClusterError when there is no controller."""

    def __init__(self, app_name: str) -> None:
        try:
            self._actor = ray.get_actor(actor_name(app_name), namespace=NAMESPACE)
        except ValueError as error:
            raise ClusterError(f"no application {app_name!r} with a controller runs on the cluster") from error

    def status(self) -> dict[str, Any]:
        """Policy, setting in force, last observation and replicas, by model."""
        status: dict[str, Any] = self._ask("status")
        return status

    def set_policy(self, law: str, level: int | None = None) -> None:
        """``law``: "off", "freeze" (the level of now), "auto" (what was deployed), "static" with a level, or another
        law's name. Raises LawError."""
        self._ask("set_policy", law, level)

    def decisions(self, limit: int = 50) -> list[dict[str, Any]]:
        """The newest decisions, newest first."""
        decisions: list[dict[str, Any]] = self._ask("decisions", limit)
        return decisions

    def pid(self) -> int:
        pid: int = self._ask("pid")
        return pid

    def _ask(self, method: str, *args: Any) -> Any:
        try:
            return ray.get(getattr(self._actor, method).remote(*args), timeout=TIMEOUT_S)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None  # what the controller raised, not Ray's account of it
