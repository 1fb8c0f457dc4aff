"""Names that several processes of a cluster must agree on: deployments in Serve, keys in Redis. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

ENGINE_DEPLOYMENT = "EngineReplica"


def engine_deployments(model_names: Sequence[str]) -> list[str]:
    """The Serve deployments of an application's models, in the same order."""
    if len(model_names) == 1:
        return [ENGINE_DEPLOYMENT]
    return [engine_deployment_of(name) for name in model_names]


def engine_deployment_of(model_name: str) -> str:
    """The deployment's name for one model of several."""
    return f"{ENGINE_DEPLOYMENT}-{re.sub(r'[^A-Za-z0-9_.-]', '-', model_name)}"


def is_engine_deployment(name: str) -> bool:
    return name.split("-")[0] == ENGINE_DEPLOYMENT


def key_prefix(app_name: str) -> str:
    """Of all Redis keys of an application."""
    return f"brownoutserve:{app_name}"
