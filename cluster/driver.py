"""Joining a running Ray cluster as a driver: what the CLI and benchmarks need for actors and handles."""

from __future__ import annotations

import logging
import os
import socket

import ray
from ray import serve
from ray._private import ray_constants, services
from ray.serve.handle import DeploymentHandle

from cluster.errors import ClusterError
from cluster.names import engine_deployment_of, is_engine_deployment

CONNECT_TIMEOUT_S = 5.0


def find_cluster(address: str | None = None) -> str:
    """Address of the cluster to join: the given one, RAY_ADDRESS, or the only one that runs on this machine.

    Raises ClusterError.
    """
    if chosen := address or os.environ.get("RAY_ADDRESS"):
        return chosen
    found: list[str] = sorted(services.find_gcs_addresses())
    if not found:
        raise ClusterError("no Ray cluster runs on this machine; start one with `brownoutserve serve`")
    if len(found) > 1:
        raise ClusterError(f"{len(found)} Ray clusters run on this machine; choose one with --address: {found}")
    return found[0]


def connect(address: str) -> None:
    """Join the cluster quietly. Raises ClusterError when it does not answer."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # as local clusters are started
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # a warning for every replica that is busy just now
    if not _listens(address):  # Ray itself would go on trying for minutes
        raise ClusterError(f"the Ray cluster at {address} does not answer")
    if address.startswith("127.0.0.1:"):
        # Else Ray would look for a loopback cluster under the machine's public address.
        ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ClusterError(f"the Ray cluster at {address} does not answer") from error


def _listens(address: str) -> bool:
    """Whether somebody takes connections there; True for what is no host and port, such as "auto"."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        return True
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S):
            return True
    except (OSError, OverflowError):
        return False


def engine_handles(app_name: str, model: str | None = None) -> list[DeploymentHandle]:
    """One for each model of the application, or for ``model`` alone. Call `connect` first."""
    app = serve.status().applications.get(app_name)
    names = [name for name in app.deployments if is_engine_deployment(name)] if app else []
    if model is not None and len(names) > 1:
        names = [name for name in names if name == engine_deployment_of(model)]
    return [serve.get_deployment_handle(name, app_name) for name in names]
