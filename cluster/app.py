"""The Serve application: an OpenAI ingress in front of engine replicas. ``import_path: cluster.app:build`` in YAML."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from cluster.autoscaling import APP
from cluster.config import ClusterConfig, parse_models
from cluster.ingress.deployment import Ingress
from cluster.names import engine_deployments, key_prefix
from cluster.replica import EngineReplica
from controller.settings import plan_key

# Serve replaces a replica after three failed checks. Its requests are ended before that, by the engine's own watch or
# by their channel; so these need not be hasty: a replica is busy, not dead, while a large step holds the interpreter.
HEALTH_CHECK_PERIOD_S = 1.0
HEALTH_CHECK_TIMEOUT_S = 5.0
POLICY = "cluster.autoscaling:PlannedReplicas"
NUM_START_ATTEMPTS = 3  # a model that cannot be loaded fails the deployment instead of being tried for ever
SHUTDOWN_GRACE_S = 10.0  # to end in good order once the requests are done


def build(args: dict[str, Any]) -> serve.Application:
    """The application for ``args`` of a Serve YAML file. Raises ClusterConfigError with one sentence."""
    return application(args, EngineReplica)


def application(args: dict[str, Any], replica: type[EngineReplica]) -> serve.Application:
    """The same with replicas of a class of your own."""
    configs = parse_models(args)
    names = engine_deployments([config.model.served_name for config in configs])
    engines = [_engines(config, name, replica) for config, name in zip(configs, names, strict=True)]
    config = configs[0]
    return serve.deployment(
        name="Ingress",
        num_replicas=config.ingress.num_replicas,
        max_ongoing_requests=config.ingress.max_concurrent + 64,  # beyond its own limit, which answers with JSON
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_timeout_s=config.drain_timeout_s + SHUTDOWN_GRACE_S,
        max_constructor_retry_count=NUM_START_ATTEMPTS,
    )(Ingress).bind(configs, *engines)


def _engines(config: ClusterConfig, name: str, replica: type[EngineReplica]) -> serve.Application:
    """One model's replicas."""
    return serve.deployment(
        name=name,
        num_replicas=None if config.autoscaling else config.replicas,
        autoscaling_config=_autoscaling(config) if config.autoscaling else None,
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=config.drain_timeout_s + SHUTDOWN_GRACE_S,
        max_constructor_retry_count=NUM_START_ATTEMPTS,
    )(replica).bind(config)


def _autoscaling(config: ClusterConfig) -> AutoscalingConfig:
    """Serve asks the plan, and adds no delays of its own to the planner's."""
    assert config.autoscaling is not None
    key = plan_key(key_prefix(APP), config.model.served_name)
    return AutoscalingConfig(
        min_replicas=config.autoscaling.min_replicas,
        max_replicas=config.autoscaling.max_replicas,
        initial_replicas=config.replicas,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        policy=AutoscalingPolicy(policy_function=POLICY, policy_kwargs={"key": key, "redis_url": config.redis_url}),
    )
