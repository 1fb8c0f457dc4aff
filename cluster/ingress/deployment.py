"""The ingress as a Serve deployment. Its replicas stay light: nothing they import knows torch."""

from __future__ import annotations

import gc

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.config import ClusterConfig, resolve_path
from cluster.ingress.admin import ControllerAdmin
from cluster.ingress.backend import ServeBackend
from cluster.ingress.routes import create_api
from cluster.ingress.service import OpenAIService
from cluster.logs import configure as configure_logging
from cluster.router.registry import LoadRegistry
from cluster.router.router import Router
from engine.tokenizer import load_tokenizer


@serve.ingress()
class Ingress:
    """HTTP entry point; as many replicas as the traffic needs, each with its own router."""

    def __init__(self, engines: DeploymentHandle, config: ClusterConfig) -> None:
        configure_logging(config.log_format)
        context = serve.get_replica_context()
        model_path = str(resolve_path(config.model.path))
        self._service = OpenAIService(
            backend=ServeBackend(engines, Router(LoadRegistry(config.resolved_redis_url(), context.app_name))),
            tokenizer=load_tokenizer(model_path),
            model_name=config.model.served_name,
            config=config.ingress,
            ingress_id=context.replica_id.unique_id,
            admin=ControllerAdmin(context.app_name),
        )
        gc.freeze()  # a collection that walks over all imported code would hold up every stream

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self._service)
