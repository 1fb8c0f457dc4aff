"""The ingress as a Serve deployment. Its replicas stay light: nothing they import knows torch."""

from __future__ import annotations

import gc
from collections.abc import Sequence

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.admission.config import AdmissionSection
from cluster.admission.key_store import key_stores
from cluster.admission.key_watch import KeyWatch
from cluster.admission.promises import PromiseReader
from cluster.admission.rates import TenantRates
from cluster.admission.shared import SharedBuckets
from cluster.config import ClusterConfig, resolve_path
from cluster.ingress.admin import ControllerAdmin
from cluster.ingress.admission import Admission
from cluster.ingress.auth import Authenticator
from cluster.ingress.backend import ServeBackend
from cluster.ingress.routes import create_api
from cluster.ingress.service import OpenAIService, ServedModel
from cluster.logs import configure as configure_logging
from cluster.names import key_prefix
from cluster.router.loads import router_group
from cluster.router.registry import LoadRegistry
from cluster.router.router import Router
from engine.text.tokenizer import load_tokenizer


@serve.ingress()
class Ingress:
    """HTTP entry point to all models; as many replicas as the traffic needs, each with its own routers."""

    def __init__(self, configs: Sequence[ClusterConfig], *engines: DeploymentHandle) -> None:
        """``engines`` belong to ``configs``, one each. What concerns the ingress is the same in all of them."""
        config = configs[0]
        configure_logging(config.log_format)
        context = serve.get_replica_context()
        self._service = OpenAIService(
            models=[_served(*of_model, context.app_name) for of_model in zip(configs, engines, strict=True)],
            config=config.ingress,
            ingress_id=context.replica_id.unique_id,
            admin=ControllerAdmin(context.app_name),
            auth=_authenticator(config, context.app_name),
            admission=_admission(configs, context.app_name),
        )
        gc.freeze()  # a collection that walks over all imported code would hold up every stream

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self._service)


def _authenticator(config: ClusterConfig, app_name: str) -> Authenticator:
    admission = config.admission or AdmissionSection()
    stores = key_stores(admission, config.resolved_redis_url, key_prefix(app_name))
    return Authenticator(admission, KeyWatch(stores) if stores else None, config.ingress.admin_token)


def _admission(configs: Sequence[ClusterConfig], app_name: str) -> Admission | None:
    config = configs[0]
    if config.admission is None:
        return None
    url, prefix, num_ingress = config.resolved_redis_url(), key_prefix(app_name), config.ingress.num_replicas
    slo_ttft_s = {of_model.model.served_name: of_model.slo.ttft_s for of_model in configs}
    rates = TenantRates(SharedBuckets(url, prefix), num_ingress)
    return Admission(config.admission, num_ingress, slo_ttft_s, rates, PromiseReader(url, prefix, list(slo_ttft_s)))


def _served(config: ClusterConfig, engines: DeploymentHandle, app_name: str) -> ServedModel:
    group = router_group(app_name, engines.deployment_name)
    registry = LoadRegistry(config.resolved_redis_url(), group, config.ingress.num_replicas)
    tokenizer = load_tokenizer(str(resolve_path(config.model.path)))
    return ServedModel(config.model.served_name, ServeBackend(engines, Router(registry)), tokenizer)
