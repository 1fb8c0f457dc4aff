"""Joining a running Ray cluster as a driver: what the CLI and benchmarks need for actors and handles."""

from __future__ import annotations

import logging
import os

import ray
from ray._private import ray_constants, services

from cluster.errors import ClusterError


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
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if address.startswith("127.0.0.1:"):
        # Else Ray would look for a loopback cluster under the machine's public address.
        ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ClusterError(f"the Ray cluster at {address} does not answer") from error
