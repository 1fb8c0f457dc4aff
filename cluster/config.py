"""What an operator may write under ``args`` of a Serve application; checked here, in one sentence per mistake.

The engine's sections are the engine's own dataclasses, so a key means the same in YAML and in code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from cluster.admission.config import AdmissionSection, check_models
from cluster.ingress.config import IngressSection
from cluster.names import key_prefix
from cluster.section import Section
from controller.config import ConfigError as ControllerConfigError
from controller.config import ControllerConfig, StreamSecurity
from controller.planner import PlannerParams
from controller.quality import QualityBudget
from controller.types import Slo
from engine.config import (
    BrownoutConfig,
    CacheConfig,
    ConfigError,
    EngineConfig,
    ModelConfig,
    SchedulerConfig,
    SloConfig,
)

REDIS_SCHEMES = ("redis://", "rediss://", "unix://")
# One of each for all models; with autoscaling each of them has its own number of replicas within the same limits.
SHARED_KEYS = frozenset({"controller", "ingress", "admission", "redis_url", "log_format", "autoscaling", "siblings"})
PROJECT_ROOT = Path(__file__).resolve().parent.parent


class ClusterConfigError(ConfigError):
    """A mistake in the cluster's configuration, in one sentence: key, value, allowed values."""


class ControllerSection(Section):
    """The slow loop: the policy in force until an operator sets another. ``level`` belongs to the law "static".

    ``quality``: service class |-> how much it may lose, e.g. standard: {mean_loss_nats: 0.01, max_loss_nats: 0.1}.
    ``security``: TLS and a shared token for the control streams; the files lie on every node.
    """

    law: str = ControllerConfig().law
    level: int = 0
    law_params: dict[str, float] = Field(default_factory=dict)
    tick_s: float = ControllerConfig().tick_s
    lease_s: float = ControllerConfig().lease_s
    window_s: float = ControllerConfig().window_s
    stale_s: float = ControllerConfig().stale_s
    hold_s: float = ControllerConfig().hold_s
    slew_levels: int = ControllerConfig().slew_levels
    quality: dict[str, QualityBudget] = Field(default_factory=dict)
    security: StreamSecurity = StreamSecurity()


class AutoscalingSection(Section):
    """How many engine replicas there may be; how many there are, the controller plans from their load at level 0.

    ``target_frac``: share of a full batch that may be planned. ``down_after_s``: how long fewer must have been enough.
    """

    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=2, ge=1)
    target_frac: float = PlannerParams().target_frac
    down_after_s: float = PlannerParams().down_after_s

    @property
    def planner(self) -> PlannerParams:
        """Raises ValueError."""
        return PlannerParams(
            min_replicas=self.min_replicas,
            max_replicas=self.max_replicas,
            target_frac=self.target_frac,
            down_after_s=self.down_after_s,
        )


@dataclass(frozen=True, slots=True)
class Siblings:
    """What the one controller must know of all models of an application, the same in each model's configuration."""

    slo_by_model: dict[str, SloConfig]
    allow_unmeasured: bool


class ClusterConfig(Section):
    """One model on one set of replicas, behind one ingress, under one controller.

    ``gpus_per_replica`` 0 serves on the CPU; ``cpus_per_replica`` only reserves room in Ray's scheduler.
    ``drain_timeout_s`` is how long a replica that is taken down may still work on the requests it has.
    With ``autoscaling``, ``replicas`` is only how many there are at first.
    ``redis_url`` defaults to the environment's REDIS_URL where the cluster runs.
    """

    model: ModelConfig
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    slo: SloConfig = SloConfig()
    brownout: BrownoutConfig = BrownoutConfig()
    device: str = "auto"
    attention: str = "auto"
    num_threads: int | None = None
    stream_interval_s: float = 0.02
    replicas: int = Field(default=1, ge=1)
    gpus_per_replica: float = Field(default=0, ge=0)
    cpus_per_replica: float = Field(default=1, ge=0)
    autoscaling: AutoscalingSection | None = None
    controller: ControllerSection = ControllerSection()
    ingress: IngressSection = IngressSection()
    admission: AdmissionSection | None = None
    drain_timeout_s: float = Field(default=60.0, ge=0)
    redis_url: str = ""
    siblings: Siblings | None = None  # not to be written: filled in by `parse_models`
    log_format: Literal["text", "json"] = "text"

    @model_validator(mode="after")
    def _engine_and_controller_accept(self) -> ClusterConfig:
        self.engine_config()
        self.controller_config("default")
        scaling = self.autoscaling
        if scaling is not None and not scaling.min_replicas <= self.replicas <= scaling.max_replicas:
            raise ClusterConfigError(
                f"replicas is {self.replicas}; allowed: {scaling.min_replicas} to {scaling.max_replicas}, "
                "the limits of autoscaling"
            )
        return self

    @property
    def max_replicas(self) -> int:
        return self.autoscaling.max_replicas if self.autoscaling else self.replicas

    def engine_config(self) -> EngineConfig:
        """What each replica's engine is started with; the model's path is resolved."""
        return EngineConfig(
            model=replace(self.model, path=str(resolve_path(self.model.path)), name=self.model.served_name),
            cache=self.cache,
            scheduler=self.scheduler,
            slo=self.slo,
            brownout=self.brownout,
            device=self.device,
            attention=self.attention,
            num_threads=self.num_threads,
            stream_interval_s=self.stream_interval_s,
        )

    def controller_config(self, app_name: str) -> ControllerConfig:
        """What the application's controller is started with; the host that runs it adds the address to bind."""
        siblings = self.siblings or Siblings({self.model.served_name: self.slo}, self.brownout.allow_unmeasured)
        slos = [Slo(ttft_s=slo.ttft_s, tpot_s=slo.tpot_s) for slo in siblings.slo_by_model.values()]
        return ControllerConfig(
            law=self.controller.law,
            level=self.controller.level,
            law_params=self.controller.law_params,
            tick_s=self.controller.tick_s,
            lease_s=self.controller.lease_s,
            window_s=self.controller.window_s,
            stale_s=self.controller.stale_s,
            slo=slos[0],
            slo_by_model=dict(zip(siblings.slo_by_model, slos, strict=True)),
            allow_unmeasured=siblings.allow_unmeasured,
            hold_s=self.controller.hold_s,
            slew_levels=self.controller.slew_levels,
            quality=self.controller.quality,
            security=self.controller.security,
            planner=self.autoscaling.planner if self.autoscaling else None,
            key_prefix=key_prefix(app_name),
        )

    def resolved_redis_url(self) -> str:
        """Raises ClusterConfigError when neither the configuration nor the environment names a Redis."""
        url = self.redis_url or os.environ.get("REDIS_URL", "")
        if not url.startswith(REDIS_SCHEMES):
            raise ClusterConfigError(  # its scheme only: a URL may hold a password
                f"redis_url starts with {url.partition(':')[0]!r}; allowed: {', '.join(REDIS_SCHEMES)}, "
                "here or as REDIS_URL in the environment"
            )
        return url


def parse_models(args: Mapping[str, Any]) -> tuple[ClusterConfig, ...]:
    """One configuration for each model of an application. Raises ClusterConfigError.

    ``models`` is a list of sections, each of which overrides, for its model, what stands beside the list.
    """
    if not isinstance(args, Mapping) or "models" not in args:
        config = parse_config(args)
        check_models(config.admission, [config.model.served_name])
        return (config,)
    shared = {key: value for key, value in args.items() if key != "models"}
    sections = args["models"]
    if not isinstance(sections, list) or not sections or not all(isinstance(s, Mapping) for s in sections):
        raise ClusterConfigError(f"models is {sections!r}; allowed: a list of sections, one for each model")
    configs = []
    for number, section in enumerate(sections):
        if common := sorted(section.keys() & SHARED_KEYS):
            raise ClusterConfigError(f"models[{number}] has {common[0]}; allowed: beside models, for all of them")
        try:
            configs.append(parse_config({**shared, **section}))
        except ClusterConfigError as error:
            raise ClusterConfigError(f"models[{number}]: {error}") from error
    names = [config.model.served_name for config in configs]
    if len(set(names)) < len(names):
        raise ClusterConfigError(f"models have the names {', '.join(names)}; allowed: different ones")
    check_models(configs[0].admission, names)
    siblings = Siblings(
        slo_by_model={config.model.served_name: config.slo for config in configs},
        allow_unmeasured=any(config.brownout.allow_unmeasured for config in configs),
    )
    return tuple(config.model_copy(update={"siblings": siblings}) for config in configs)


def parse_config(args: Mapping[str, Any]) -> ClusterConfig:
    """Check the ``args`` of a Serve application. Raises ClusterConfigError."""
    if not isinstance(args, Mapping):
        raise ClusterConfigError(f"args is {args!r}; allowed: a mapping of configuration keys")
    try:
        # Through JSON, because only there strict mode takes lists for tuples and mappings for dataclasses.
        return ClusterConfig.model_validate_json(json.dumps(args, default=str))
    except ValidationError as error:
        raise ClusterConfigError(describe(error)) from error
    except (TypeError, ValueError) as error:
        raise ClusterConfigError(f"args cannot be read: {error}") from error


def resolve_path(path: str) -> Path:
    """An absolute path as it is; a relative one from the working directory, else from the project's root."""
    given = Path(path).expanduser()
    if given.is_absolute():
        return given
    candidates = (Path.cwd() / given, PROJECT_ROOT / given)
    return next((candidate for candidate in candidates if candidate.exists()), candidates[0])


def describe(error: ValidationError) -> str:
    """The first mistake in one sentence: key, value, allowed values."""
    mistake = error.errors()[0]
    cause = mistake.get("ctx", {}).get("error")
    if isinstance(cause, (ConfigError, ControllerConfigError)):
        return str(cause)
    key = ".".join(str(part) for part in mistake["loc"]) or "args"
    if mistake["type"] == "missing":
        return f"{key} is missing; it has no default"
    if mistake["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{key} is {mistake['input']!r}; allowed: no such key{_known_keys(mistake)}"
    return f"{key} is {mistake['input']!r}; allowed: {_allowed(mistake)}"


def _allowed(mistake: ErrorDetails) -> str:
    text = mistake["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return text[0].lower() + text[1:]


def _known_keys(mistake: ErrorDetails) -> str:
    """The keys of the section in which an unknown one was found."""
    section: Any = ClusterConfig
    for part in mistake["loc"][:-1]:
        section = section.model_fields[str(part)].annotation if hasattr(section, "model_fields") else None
    names = getattr(section, "model_fields", None) or getattr(section, "__dataclass_fields__", None)
    return f", one of {', '.join(names)}" if names else ""
