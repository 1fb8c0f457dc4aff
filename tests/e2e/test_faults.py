"""Every part of a cluster may be killed while it serves: what the design promises then, against real processes.

Each test leaves the cluster whole.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest

from cluster.errors import ClusterError
from cluster.local.cluster import LocalCluster
from cluster.reports import ReplicaReport
from tests.e2e.conftest import MODEL, NUM_REPLICAS, Metrics, running_replicas
from tests.waiting import until, until_async

pytestmark = pytest.mark.cluster

# A kept connection may be closed by the proxy while the next request is on its way: that is the client's to repeat.
NO_KEPT_CONNECTIONS = httpx.Limits(max_keepalive_connections=0)
COMPLETION = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 16, "temperature": 0}


class Traffic:
    """Clients that send one request after another until the with-block ends; remembers every status."""

    def __init__(self, url: str, body: Mapping[str, Any] = COMPLETION, num_clients: int = 1) -> None:
        self._url = f"{url}/v1/completions"
        self._body = body
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(num_clients)]
        self.statuses: list[int | str] = []  # or what became of it instead

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def wait_for_more(self, count: int) -> None:
        target = len(self.statuses) + count
        until(lambda: len(self.statuses) >= target)

    def _run(self) -> None:
        with httpx.Client(timeout=120, limits=NO_KEPT_CONNECTIONS) as client:
            while not self._stopping.is_set():
                try:
                    self.statuses.append(client.post(self._url, json=self._body).status_code)
                except httpx.HTTPError as error:
                    self.statuses.append(repr(error))


def replica_reports(cluster: LocalCluster) -> list[ReplicaReport]:
    reports: list[ReplicaReport] = cluster.engine_handle().broadcast("report").results(timeout_s=120)
    return reports


def model_status(cluster: LocalCluster) -> dict[str, Any]:
    """Empty: the controller does not know the model (yet), or is being restarted or replaced."""
    try:
        status: dict[str, Any] = cluster.controller.status()["models"].get(MODEL, {})
    except ClusterError:
        return {}
    return status


def has_redis(cluster: LocalCluster) -> bool | None:
    """Whether the controller has it; None: it does not say."""
    try:
        return bool(cluster.controller.status()["redis_ok"])
    except ClusterError:
        return None


def controller_pid(cluster: LocalCluster) -> int | None:
    try:
        return cluster.controller.pid()
    except ClusterError:
        return None


def all_replicas_follow(cluster: LocalCluster) -> bool:
    """Whether both have the controller's newest setting."""
    status = model_status(cluster)
    replicas = status.get("replicas", {}).values()
    return len(replicas) == 2 and all(
        not replica["stale"] and replica["applied_version"] == status["version"] for replica in replicas
    )


def nothing_is_held(metrics: Metrics) -> bool:
    """By the ingress, or by an engine for nobody."""
    names = ("http_requests_held", "running_requests", "kv_used_blocks")
    return metrics.total("replicas") == NUM_REPLICAS and all(metrics.total(name) == 0 for name in names)


def test_controller_killed(cluster: LocalCluster) -> None:
    """Replicas go on, find the restarted controller, and versions continue."""
    controller = cluster.controller
    controller.set_policy("static", 1)
    until(lambda: all_replicas_follow(cluster))
    before = model_status(cluster)
    old_pid = controller.pid()
    with Traffic(cluster.url) as traffic:
        traffic.wait_for_more(3)
        os.kill(old_pid, signal.SIGKILL)
        traffic.wait_for_more(3)
        until(lambda: controller_pid(cluster) not in (None, old_pid))
        until(lambda: all_replicas_follow(cluster))
        traffic.wait_for_more(3)
    assert set(traffic.statuses) == {200}
    after = model_status(cluster)
    assert after["epoch"] > before["epoch"]
    assert after["version"] >= before["version"]
    assert after["policy"] == before["policy"]  # what the operator had set outlives the controller
    controller.set_policy("off")
    assert model_status(cluster)["version"] > after["version"]
    until(lambda: all_replicas_follow(cluster))
    usage = httpx.post(f"{cluster.url}/v1/completions", json=COMPLETION, timeout=60).json()["usage"]
    assert usage["brownout"]["setting_version"] == model_status(cluster)["version"]


def test_a_controller_that_hangs_is_one_sentence(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    controller = cluster.controller
    pid = controller.pid()
    monkeypatch.setattr("cluster.controller_client.TIMEOUT_S", 0.5)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(ClusterError, match="did not answer within"):
            controller.status()
    finally:
        os.kill(pid, signal.SIGCONT)
    monkeypatch.undo()
    until(lambda: all_replicas_follow(cluster))


def test_redis_killed_and_restarted(cluster: LocalCluster) -> None:
    """No request fails: routing falls back to Serve's choice, the controller goes on in memory."""
    pid = cluster.redis.pid
    assert pid is not None
    with Traffic(cluster.url) as traffic:
        traffic.wait_for_more(3)
        os.kill(pid, signal.SIGKILL)
        until(lambda: has_redis(cluster) is False)
        traffic.wait_for_more(10)
        cluster.redis.start()
        until(lambda: has_redis(cluster))
        traffic.wait_for_more(10)
    assert set(traffic.statuses) == {200}
    until(lambda: all_replicas_follow(cluster))


@dataclass
class Answer:
    """What one streaming client got."""

    num_chunks: int = 0
    finish_reason: str | None = None
    error: openai.APIError | None = None
    was_streaming_at_kill: bool = False


async def read_stream(api: openai.AsyncOpenAI, number: int, answer: Answer) -> None:
    try:
        stream = await api.completions.create(
            model=MODEL,
            prompt=f"Story {number}",
            max_tokens=400,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        async for chunk in stream:
            answer.num_chunks += 1
            answer.finish_reason = chunk.choices[0].finish_reason
    except openai.APIError as error:
        answer.error = error


async def test_replica_killed_under_load(cluster: LocalCluster, read_metrics: Callable[[str], Metrics]) -> None:
    """Requests not yet streaming are served elsewhere, streaming ones end with an error event, none hangs."""
    victim = (await asyncio.to_thread(replica_reports, cluster))[0]
    answers = [Answer() for _ in range(48)]  # a replica runs 16, so that some of each replica's wait
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=300) as api:
        streams = [asyncio.create_task(read_stream(api, number, answer)) for number, answer in enumerate(answers)]
        # 32 can only have begun if both replicas have begun some: neither has been sent so many.
        await until_async(lambda: sum(answer.num_chunks > 0 for answer in answers) >= 32)
        for answer in answers:
            answer.was_streaming_at_kill = answer.num_chunks > 0
        os.kill(victim.pid, signal.SIGKILL)
        async with asyncio.timeout(300):
            await asyncio.gather(*streams)
    failed = [answer for answer in answers if answer.error is not None]
    assert failed, "the victim was streaming something"
    assert all(answer.num_chunks > 0 for answer in failed)
    assert all(answer.error.code == "replica_lost" for answer in failed)
    assert all(answer.finish_reason == "length" for answer in answers if answer.error is None)
    waiting = [answer for answer in answers if not answer.was_streaming_at_kill]
    assert waiting
    assert len(failed) <= 28, "more than the victim had"

    await asyncio.to_thread(until, lambda: is_replaced(cluster, victim.replica_id))
    await asyncio.to_thread(until, lambda: read_metrics(cluster.url).total("replicas") == 2)
    await asyncio.to_thread(until, lambda: all_replicas_follow(cluster))
    await asyncio.to_thread(until, lambda: nothing_is_held(read_metrics(cluster.url)))


def is_replaced(cluster: LocalCluster, replica_id: str) -> bool:
    ids = running_replicas(cluster)
    return len(ids) == 2 and replica_id not in ids
