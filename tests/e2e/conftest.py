"""Real clusters for tests: Ray, Redis, controller, ingress and two replicas of a tiny random model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.local.cluster import LocalCluster, ServeUnavailableError
from cluster.local.processes import free_ports
from cluster.serve_file import ServeFile, parse_serve_document
from tests.models import write_config
from tests.waiting import TIMEOUT_S, until

MODEL = "tiny"
ADMIN_TOKEN = "let me steer"
CONTEXT_TOKENS = 1000  # what a replica's KV blocks hold, and some seconds of work
NUM_REPLICAS = 2
HEADER_TIMEOUT_S = 8  # of all clients of the cluster, which may themselves have to wait for a processor
MAX_CLIENT_CONNECTIONS = 256


@pytest.fixture(scope="session")
def serve_document(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Makes Serve YAML documents; keyword arguments replace sections of ``args``."""
    model_path = write_config(tmp_path_factory.mktemp("models") / MODEL, max_position_embeddings=CONTEXT_TOKENS)

    def make(**sections: Any) -> dict[str, Any]:
        args = {
            "model": {"path": str(model_path), "load_format": "random", "max_model_len": CONTEXT_TOKENS},
            "replicas": NUM_REPLICAS,
            "num_threads": 1,
            "cache": {"num_blocks": 64},
            "scheduler": {"max_num_seqs": 16, "max_num_batched_tokens": 64},
            "brownout": {
                "ways": [2],
                "exempt_first": 0,
                "exempt_last": 0,
                "allow_unmeasured": True,
                "profile_repeats": 0,
            },
            "controller": {"law": "static", "level": 0, "lease_s": 20},  # on a busy machine too, a level stays pinned
            "ingress": {"idle_timeout_s": 60, "body_timeout_s": HEADER_TIMEOUT_S, "admin_token": ADMIN_TOKEN},
            "log_format": "json",
        }
        return {
            "http_options": {"host": "127.0.0.1", "port": free_ports(1)[0]},
            "logging_config": {"log_level": "WARNING", "enable_access_log": False},
            "applications": [
                {
                    "name": "brownoutserve",
                    "import_path": "cluster.app:build",
                    "route_prefix": "/",
                    "args": {**args, **sections},
                }
            ],
        }

    return make


@pytest.fixture(scope="session")
def serve_file(serve_document: Callable[..., dict[str, Any]]) -> Callable[..., ServeFile]:
    """The same, checked."""
    return lambda **sections: parse_serve_document(serve_document(**sections))


@pytest.fixture(scope="session")
def cluster(serve_file: Callable[..., ServeFile]) -> Iterator[LocalCluster]:
    """One cluster for all tests that leave it as they found it. A Ray driver can join one cluster only at a time."""
    with pytest.MonkeyPatch.context() as patch:  # see deploy/ray/haproxy.sh
        patch.setenv("HEADER_TIMEOUT_S", str(HEADER_TIMEOUT_S))
        patch.setenv("MAX_CLIENT_CONNECTIONS", str(MAX_CLIENT_CONNECTIONS))
        with LocalCluster.start(serve_file()) as cluster:
            yield cluster


def running_replicas(cluster: LocalCluster) -> dict[str, int]:
    """id |-> pid of the engine replicas that Serve counts as running; none while the application is not."""
    try:
        app = cluster.serve_details()["applications"].get(cluster.file.app_name)
    except ServeUnavailableError:
        return {}
    if app is None or app["status"] != "RUNNING":
        return {}
    engines = app["deployments"].get("EngineReplica", {"replicas": []})  # none for an instant after a deploy
    return {replica["replica_id"]: replica["pid"] for replica in engines["replicas"] if replica["state"] == "RUNNING"}


class Metrics:
    """One reading of a cluster's /metrics."""

    def __init__(self, url: str, token: str = "") -> None:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        page = _read(f"{url}/metrics", headers)
        self._samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]

    def total(self, name: str, **labels: str) -> float:
        """Sum over the series that carry ``labels``."""
        return sum(
            sample.value
            for sample in self._samples
            if sample.name == f"brownoutserve_{name}" and labels.items() <= sample.labels.items()
        )

    def label_values(self, label: str) -> set[str]:
        return {sample.labels[label] for sample in self._samples if label in sample.labels}


def _read(url: str, headers: dict[str, str]) -> str:
    deadline_s = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return httpx.get(url, headers=headers, timeout=60).raise_for_status().text
        except httpx.HTTPError:  # the ingress is being replaced
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.2)


def whole_metrics(url: str) -> Metrics:
    """A reading with both replicas: one that is busy may not answer in time, and its counts are missing then."""
    readings: list[Metrics] = []

    def is_whole() -> bool:
        readings.append(Metrics(url))
        return readings[-1].total("replicas") == NUM_REPLICAS

    until(is_whole)
    return readings[-1]


@pytest.fixture(scope="session")
def read_metrics() -> Callable[[str], Metrics]:
    return Metrics
