"""Replicas come and go as the controller plans, through Serve's own autoscaling, and no request notices."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from cluster.local.cluster import LocalCluster
from cluster.serve_file import ServeFile
from tests.e2e.conftest import MODEL
from tests.e2e.test_faults import Traffic, model_status
from tests.waiting import until

pytestmark = pytest.mark.cluster

NUM_CLIENTS = 24
BODY = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 48, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def scaling_cluster(cluster: LocalCluster, serve_file: Callable[..., ServeFile]) -> Iterator[LocalCluster]:
    """The cluster of all tests, with room for one replica more than it starts with; put back in the end."""
    before = cluster.file
    cluster.redeploy(serve_file(replicas=1, autoscaling={"max_replicas": 2, "down_after_s": 3.0}))
    yield cluster
    cluster.redeploy(before)


def num_replicas(cluster: LocalCluster) -> int:
    """As the controller, which may just be being replaced, knows them."""
    return len(model_status(cluster).get("replicas", ()))


def test_up_under_load_and_down_again(scaling_cluster: LocalCluster) -> None:
    cluster = scaling_cluster
    until(lambda: num_replicas(cluster) == 1)
    with Traffic(cluster.url, BODY, NUM_CLIENTS) as load:
        until(lambda: num_replicas(cluster) == 2)
        num_before = len(load.statuses)
        until(lambda: len(load.statuses) > num_before + NUM_CLIENTS)
    with Traffic(cluster.url, BODY) as trickle:
        until(lambda: num_replicas(cluster) == 1)
        num_before = len(trickle.statuses)
        until(lambda: len(trickle.statuses) > num_before + 3)
    assert set(load.statuses) | set(trickle.statuses) == {200}
    # In the order of time. On a busy machine the trickle alone may ask for a second replica again.
    plans = [row for row in reversed(cluster.controller.decisions(10_000)) if row["kind"] == "plan"]
    desired = [row["decision"]["desired"] for row in plans]
    up = desired.index(2)
    assert desired[:up] == [1] and desired[up + 1] == 1
    assert plans[up]["reason"] in ("overload", "cold_start", "at_max") and plans[up + 1]["reason"] == "consolidate"
    assert plans[up + 1]["inputs"]["cold_start_s"] > 0, "measured while the second replica came"
