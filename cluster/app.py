"""The Serve application: an OpenAI ingress in front of engine replicas. ``import_path: cluster.app:build`` in YAML."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from cluster.config import ClusterConfig, parse_config, resolve_path
from cluster.ingress.backend import ServeBackend
from cluster.ingress.routes import OpenAIService, create_api
from cluster.replica import EngineReplica
from cluster.router.router import RedisRouter
from engine.tokenizer import load_tokenizer

HEALTH_CHECK_PERIOD_S = 2.0
HEALTH_CHECK_TIMEOUT_S = 20.0  # a replica is busy, not dead, while a large model's step holds the interpreter
NUM_START_ATTEMPTS = 3  # a model that cannot be loaded fails the deployment instead of being tried for ever
SHUTDOWN_GRACE_S = 20.0  # for requests in flight when a replica is taken down


@serve.ingress()
class Ingress:
    """HTTP entry point; as many replicas as the traffic needs, each with its own router."""

    def __init__(self, engines: DeploymentHandle, config: ClusterConfig) -> None:
        model_path = str(resolve_path(config.model.path))
        self._service = OpenAIService(
            backend=ServeBackend(engines),
            tokenizer=load_tokenizer(model_path),
            model_name=config.model.served_name,
            config=config.ingress,
            ingress_id=serve.get_replica_context().replica_id.unique_id,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self._service)


def build(args: dict[str, Any]) -> serve.Application:
    """The application for ``args`` of a Serve YAML file. Raises ClusterConfigError with one sentence."""
    config = parse_config(args)
    engines = serve.deployment(
        EngineReplica,
        name="EngineReplica",
        num_replicas=config.replicas,
        max_ongoing_requests=config.max_ongoing_requests,
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
        request_router_config=RequestRouterConfig(
            request_router_class=RedisRouter, request_router_kwargs={"redis_url": config.redis_url}
        ),
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=SHUTDOWN_GRACE_S,
        max_constructor_retry_count=NUM_START_ATTEMPTS,
    ).bind(config)
    return serve.deployment(
        Ingress,
        name="Ingress",
        num_replicas=config.ingress.num_replicas,
        max_ongoing_requests=config.ingress.max_concurrent + 64,  # beyond its own limit, which answers with JSON
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        max_constructor_retry_count=NUM_START_ATTEMPTS,
    ).bind(engines, config)
