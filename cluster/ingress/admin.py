"""GET and PUT /v1/brownout: read the policy and what it does, pin a level. It is the controller that is asked."""

from __future__ import annotations

import asyncio
import math
from typing import Annotated, Any, Protocol

import ray
from pydantic import ConfigDict, Field, model_validator
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from cluster.controller_host import NAMESPACE, actor_name
from cluster.ingress.errors import ApiError, Outcome
from cluster.ingress.openai.body import Body
from controller.laws.base import LawError

TIMEOUT_S = 5.0
SHOWN = ("policy", "epoch", "redis_ok", "models")


class PolicyBody(Body):
    """``law``: "auto" (the deployed one), "off", "freeze", "static" with a level, or another law's name; a level alone
    pins. ``model``: the one concerned; all of them without it. A misspelt key is refused: left out, the order would be
    another one."""

    model_config = ConfigDict(extra="forbid", strict=True)

    law: str = "static"
    level: Annotated[int, Field(ge=0)] | None = None
    model: str | None = None

    @model_validator(mode="after")
    def _orders_something(self) -> PolicyBody:
        if self.law == "static" and self.level is None:
            raise ApiError(Outcome.INVALID, 'level is missing; or give a law, such as {"law": "auto"}', "level")
        return self


class BrownoutAdmin(Protocol):
    """Whoever decides about brownout."""

    async def status(self) -> dict[str, Any]:
        """As the CLI shows it. ApiError (unavailable) while it does not answer."""
        ...

    async def set_policy(self, law: str, level: int | None, model: str | None) -> None:
        """Raises ApiError: unavailable, or invalid when the law, its level or the model does not exist."""
        ...


class ControllerAdmin:
    """The application's controller actor, found by name on each call: Ray restarts it as it likes."""

    def __init__(self, app_name: str) -> None:
        self._name = actor_name(app_name)

    async def status(self) -> dict[str, Any]:
        status: dict[str, Any] = await self._ask("status")
        return status

    async def set_policy(self, law: str, level: int | None, model: str | None) -> None:
        await self._ask("set_policy", law, level, model)

    async def _ask(self, method: str, *args: Any) -> Any:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                actor: ActorHandle = await asyncio.to_thread(ray.get_actor, self._name, namespace=NAMESPACE)
                return await getattr(actor, method).remote(*args)
        except RayTaskError as error:
            if isinstance(error.cause, LawError):
                subject = str(error.cause).partition(" ")[0]
                param = subject if subject in PolicyBody.model_fields else "law"
                raise ApiError(Outcome.INVALID, str(error.cause), param) from error
            raise
        except (TimeoutError, ValueError, RayError) as error:
            raise ApiError(Outcome.UNAVAILABLE, "the controller does not answer", retry_after_s=1.0) from error


def shown(status: dict[str, Any]) -> dict[str, Any]:
    """What of the controller's status goes out; JSON knows no infinity, so unbounded values become null."""
    return {key: _finite(status[key]) for key in SHOWN if key in status}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
