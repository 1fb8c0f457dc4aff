"""The controller actor for callers outside the cluster's event loops: operators, tests, benchmarks."""

from __future__ import annotations

import time
from typing import Any

import ray

from cluster.controller_host import NAMESPACE, actor_name
from cluster.driver import engine_handles
from cluster.errors import ClusterError

APPLY_TIMEOUT_S = 120.0
POLL_S = 0.05
TIMEOUT_S = 30.0  # Ray holds calls back while the actor restarts


class ControllerClient:
    """Needs a process connected to the cluster (``ray.init``). Raises ClusterError when there is no controller,
    or when it does not answer."""

    def __init__(self, app_name: str) -> None:
        self._app_name = app_name
        try:
            self._actor = ray.get_actor(actor_name(app_name), namespace=NAMESPACE)
        except ValueError as error:
            raise ClusterError(f"no application {app_name!r} with a controller runs on the cluster") from error

    def status(self) -> dict[str, Any]:
        """Policy, setting in force, last observation and replicas, by model."""
        status: dict[str, Any] = self._ask("status")
        return status

    def set_policy(self, law: str, level: int | None = None, model: str | None = None) -> None:
        """``law``: "off", "freeze" (the level of now), "auto" (what was deployed), "static" with a level, or another
        law's name; for one model or for all. Raises LawError."""
        self._ask("set_policy", law, level, model)

    def wait_applied(self, model: str) -> None:
        """Return once every replica of the model follows its newest setting. Raises ClusterError."""
        deadline_s = time.monotonic() + APPLY_TIMEOUT_S
        while time.monotonic() < deadline_s:
            status = self.status()["models"].get(model, {"replicas": {}})
            replicas = status["replicas"].values()
            if replicas and all(
                (replica["applied_epoch"], replica["applied_version"]) == (status["epoch"], status["version"])
                for replica in replicas
            ):
                return
            time.sleep(POLL_S)
        raise ClusterError(f"not every replica of {model} took the newest setting within {APPLY_TIMEOUT_S:g} s")

    def decisions(self, limit: int = 50) -> list[dict[str, Any]]:
        """The newest decisions, newest first."""
        decisions: list[dict[str, Any]] = self._ask("decisions", limit)
        return decisions

    def decisions_between(self, since_s: float, until_s: float) -> list[dict[str, Any]]:
        """Those of [since_s, until_s), Unix time by the controller's clock, newest first."""
        decisions: list[dict[str, Any]] = self._ask("decisions_between", since_s, until_s)
        return decisions

    def decisions_of(self, model_id: str, first: int, last: int) -> list[dict[str, Any]]:
        """The settings of a model with versions ``first`` to ``last``, newest first."""
        decisions: list[dict[str, Any]] = self._ask("decisions_of", model_id, first, last)
        return decisions

    def requests_of(self, request_id: str) -> list[dict[str, Any]]:
        """What became of an API request's choices and attempts, as far as replicas remember them."""
        return _by_end(self._ask_replicas("requests_of", request_id))

    def requests_between(self, since_s: float, until_s: float, limit: int) -> list[dict[str, Any]]:
        """Requests that ended in [since_s, until_s) by the replicas' clocks; at most ``limit`` of each replica."""
        return _by_end(self._ask_replicas("requests_between", since_s, until_s, limit))

    def level_changes(self, since_s: float, until_s: float) -> list[dict[str, Any]]:
        """Level changes of the replicas' own governors in [since_s, until_s) by the replicas' clocks, oldest first."""
        return sorted(self._ask_replicas("level_changes", since_s, until_s), key=lambda change: change["at_s"])

    def pid(self) -> int:
        pid: int = self._ask("pid")
        return pid

    def _ask_replicas(self, method: str, *args: Any) -> list[dict[str, Any]]:
        answers: list[list[dict[str, Any]]] = []
        try:
            for engines in engine_handles(self._app_name):
                answers += engines.broadcast(method, *args).results(timeout_s=TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise ClusterError(f"the engine replicas do not answer: {error}") from error
        return [record for answer in answers for record in answer]

    def _ask(self, method: str, *args: Any) -> Any:
        try:
            return ray.get(getattr(self._actor, method).remote(*args), timeout=TIMEOUT_S)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None  # what the controller raised, not Ray's account of it
        except ray.exceptions.RayError as error:
            late = isinstance(error, ray.exceptions.GetTimeoutError)
            what = f"did not answer within {TIMEOUT_S:g} s: it hangs or" if late else "cannot be reached: it died or"
            raise ClusterError(
                f"the controller of {self._app_name!r} {what} is being restarted; "
                "replicas go on with their last setting"
            ) from error


def _by_end(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(records, key=lambda record: record["ended_at_s"])
