"""Tenants and what each may do. Pure."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from engine.config import ConfigError, require
from engine.types import ServiceClass

ANONYMOUS = "anonymous"  # whoever comes while no keys are asked for
TENANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What a tenant may do; None: no limit. Rates and concurrency hold over all ingress replicas together.

    ``service_class``: of requests that name none; ``may_ask_full``: whether they may refuse to be dimmed.
    ``requests_per_minute``, ``tokens_per_minute`` (prompt and answer): a minute's worth may come at once.
    ``max_concurrent``: requests in a model's engines at a time; others wait, at most ``max_queued`` for each model in
    each ingress replica, more get 429.
    ``weight``: its share of the engines' tokens, against those of other tenants that also wait.
    ``ttft_s``: how long its requests may wait for their first token before some are refused, by default the model's
    SLO. ``models``: names it may use, by default all.
    """

    service_class: ServiceClass = ServiceClass.STANDARD
    may_ask_full: bool = True
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    max_queued: int = 256
    weight: float = 1.0
    ttft_s: float | None = None
    models: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute", "max_concurrent"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"admission: {name}", value, "1 or more")
        require(self.max_queued >= 0, "admission: max_queued", self.max_queued, "0 or more")
        require(0 < self.weight < math.inf, "admission: weight", self.weight, "a positive number")
        require(
            self.ttft_s is None or self.ttft_s > 0, "admission: ttft_s", self.ttft_s, "a positive number of seconds"
        )

    def may_use(self, model: str) -> bool:
        return not self.models or model in self.models


UNLIMITED = TenantLimits()


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose request it is; ``key_id`` is empty where no keys are asked for."""

    name: str
    limits: TenantLimits
    key_id: str = ""


def check_tenant_name(name: str) -> None:
    """Raises ConfigError. Names stand in Redis keys, metric labels and log lines."""
    if not TENANT_NAME.fullmatch(name):
        raise ConfigError(
            f"tenant is {name!r}; allowed: a letter or digit, then up to 63 letters, digits, dots, dashes, underscores"
        )
