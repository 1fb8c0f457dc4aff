"""One request's way through the log lines of all processes, by its id and its trace; no line holds what was said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.local.cluster import LocalCluster
from tests.e2e.conftest import MODEL
from tests.waiting import until

pytestmark = pytest.mark.cluster

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECRET = "the password is zanzibar"


def log_lines(cluster: LocalCluster) -> list[str]:
    """Of every process of the cluster, as Ray keeps them."""
    logs = Path(cluster._scratch.path / "session_latest/logs")
    files = [path for path in logs.rglob("*") if path.is_file()]
    assert any(path.name.startswith("worker-") for path in files)
    lines = [line for path in files for line in path.read_text(errors="replace").splitlines(keepends=True)]
    return [line for line in lines if line.endswith("\n")]  # not one that is just being written


def lines_of(cluster: LocalCluster, request_id: str) -> dict[str, dict[str, Any]]:
    """By logger."""
    lines = [json.loads(line) for line in log_lines(cluster) if line.startswith("{") and f'"{request_id}' in line]
    return {line["logger"]: line for line in lines}


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_is_followed_through_ingress_router_and_engine(cluster: LocalCluster, stream: bool) -> None:
    request_id = f"followed-{stream}"
    headers = {"x-request-id": request_id, "traceparent": f"00-{TRACE}-{PARENT}-01"}
    body = {"model": MODEL, "messages": [{"role": "user", "content": SECRET}], "max_tokens": 12, "ignore_eos": True}
    answer = httpx.post(
        f"{cluster.url}/v1/chat/completions", json={**body, "stream": stream}, headers=headers, timeout=60
    )
    assert answer.status_code == 200
    until(lambda: len(lines_of(cluster, request_id)) >= 3)
    lines = lines_of(cluster, request_id)
    ingress, router, engine = (
        lines[name] for name in ("cluster.ingress.visit", "cluster.router.router", "engine.request_state")
    )
    assert ingress["request_id"] == request_id
    assert router["request_id"] == engine["request_id"]  # the ingress' own, and what tells its choices apart
    assert router["request_id"].startswith(f"{request_id}-")
    assert {line["trace_id"] for line in (ingress, router, engine)} == {TRACE}
    assert router["parent_span_id"] == engine["parent_span_id"] == ingress["span_id"] != PARENT
    assert router["replica_id"] in cluster.replica_ids()
    assert router["of"] == 2
    assert router["by"] in ("load", "own count")  # the first request of an ingress comes before the first loads
    assert (ingress["outcome"], ingress["status"], ingress["stream"]) == ("ok", 200, stream)
    assert ingress["completion_tokens"] == engine["completion_tokens"] == 12
    assert not [line for line in log_lines(cluster) if "zanzibar" in line]


def test_a_refused_request_has_one_line(cluster: LocalCluster) -> None:
    body = {"model": MODEL, "prompt": SECRET, "max_tokens": -1}
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, headers={"x-request-id": "refused-1"}, timeout=60)
    assert answer.status_code == 400
    until(lambda: lines_of(cluster, "refused-1"))
    (line,) = lines_of(cluster, "refused-1").values()
    assert (line["logger"], line["outcome"], line["status"]) == ("cluster.ingress.visit", "invalid", 400)
    assert len(line["trace_id"]) == 32
