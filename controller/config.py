"""Everything the controller can be told at start. What may change while it runs is the policy (see settings.py)."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from controller.guard import GuardParams
from controller.laws.base import LAWS, LawError, create_law
from controller.planner import PlannerParams
from controller.quality import QualityBudget
from controller.types import Slo


class ConfigError(ValueError):
    """A configuration value that cannot work, in one sentence."""


def require(holds: bool, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{key} is {value!r}; allowed: {allowed}")


@dataclass(frozen=True, slots=True)
class StreamSecurity:
    """TLS and a shared token for the control streams; paths are read on the node that uses them. Empty: without.

    The certificate must name the controller's address, or ``server_name``, which replicas then expect instead of it.
    """

    cert_file: str = ""
    key_file: str = ""
    ca_file: str = ""  # whom replicas trust
    server_name: str = ""
    token_file: str = ""  # the token is the file's text without surrounding space

    def __post_init__(self) -> None:
        given = [bool(path) for path in (self.cert_file, self.key_file, self.ca_file)]
        require(
            all(given) or not any(given),
            "controller.security",
            f"cert_file {self.cert_file!r}, key_file {self.key_file!r}, ca_file {self.ca_file!r}",
            "all three or none",
        )

    @property
    def has_tls(self) -> bool:
        return bool(self.cert_file)


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """One controller. ``law``, ``level`` and ``law_params`` are the policy until an operator sets another.

    Sizing: ``lease_s`` bounds how long replicas follow a controller that died; it is renewed three times within its
    length, and replicas report every 0.25 s, so keep it above 1 s. ``window_s`` is what laws observe by default: long
    enough for about 10 finished requests, short enough to forget a burst.
    """

    law: str = "predictive"
    level: int = 0  # of law "static"
    law_params: Mapping[str, float] = field(default_factory=dict)
    tick_s: float = 0.25
    lease_s: float = 2.0
    window_s: float = 10.0
    stale_s: float = 1.0  # a replica that has been silent for longer does not count as observed
    slo: Slo = field(default_factory=lambda: Slo(ttft_s=1.0, tpot_s=0.1))
    slo_by_model: Mapping[str, Slo] = field(default_factory=dict)  # overrides ``slo``
    allow_unmeasured: bool = False  # dim ladders whose quality losses are not known
    quality: Mapping[str, QualityBudget] = field(default_factory=dict)  # by service class; others have no limit
    hold_s: float = 10.0  # without a reported step, laws' floors end after so long
    slew_levels: int = 2  # that a law may force levels to move within a tick
    planner: PlannerParams | None = None  # None: the number of replicas is not planned
    security: StreamSecurity = field(default_factory=StreamSecurity)
    host: str = "127.0.0.1"  # what the gRPC server binds; never a public or wildcard address
    port: int = 0  # 0: a free one
    key_prefix: str = "brownoutserve"  # of all Redis keys; one per cluster that shares a Redis

    def __post_init__(self) -> None:
        require(self.law in LAWS, "controller.law", self.law, ", ".join(LAWS))
        for name in ("tick_s", "lease_s", "window_s", "stale_s", "hold_s"):
            require(getattr(self, name) > 0, f"controller.{name}", getattr(self, name), "a positive number of seconds")
        require(
            self.lease_s > 3 * self.tick_s,
            "controller.lease_s",
            self.lease_s,
            f"more than three ticks ({3 * self.tick_s:g} s), or it would end before it is renewed",
        )
        require(self.slew_levels >= 1, "controller.slew_levels", self.slew_levels, "1 or more levels")
        for model_id, slo in (("", self.slo), *self.slo_by_model.items()):
            key = f"controller.slo_by_model[{model_id!r}]" if model_id else "controller.slo"
            is_finite = math.isfinite(slo.ttft_s) and math.isfinite(slo.tpot_s)
            require(is_finite and slo.ttft_s > 0 and slo.tpot_s > 0, key, slo, "positive numbers of seconds")
        require(_is_inside(self.host), "controller.host", self.host, "a loopback or private IP address")
        require(0 <= self.port <= 65535, "controller.port", self.port, "0 to 65535")
        require(
            bool(self.key_prefix) and not set(self.key_prefix) & set("{} \n"),
            "controller.key_prefix",
            self.key_prefix,
            "a word without braces or spaces",
        )
        try:
            create_law(self.law, self.slo, self.params)
        except LawError as error:
            raise ConfigError(f"controller: {error}") from error

    @property
    def params(self) -> Mapping[str, float]:
        return {"level": self.level} if self.law == "static" else self.law_params

    @property
    def guard(self) -> GuardParams:
        return GuardParams(self.allow_unmeasured, self.quality, self.hold_s, self.slew_levels, self.tick_s)

    def slo_of(self, model_id: str) -> Slo:
        return self.slo_by_model.get(model_id, self.slo)


def _is_inside(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return not (address.is_global or address.is_unspecified or address.is_multicast)
