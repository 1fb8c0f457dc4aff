"""Every part of a cluster may be killed while it serves: what the design promises then, against real processes.

Each test leaves the cluster whole.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass

import httpx
import openai
import pytest

from cluster.local import LocalCluster
from cluster.reports import ReplicaReport
from tests.e2e.conftest import MODEL, Metrics
from tests.waiting import until

pytestmark = pytest.mark.cluster

COMPLETION = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 16, "temperature": 0}


class Traffic:
    """Short requests, one after another, until the with-block ends; remembers every status."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/v1/completions"
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.statuses: list[int] = []

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def wait_for_more(self, count: int) -> None:
        target = len(self.statuses) + count
        until(lambda: len(self.statuses) >= target)

    def _run(self) -> None:
        with httpx.Client(timeout=60) as client:
            while not self._stopping.is_set():
                self.statuses.append(client.post(self._url, json=COMPLETION).status_code)


def replica_reports(cluster: LocalCluster) -> list[ReplicaReport]:
    reports: list[ReplicaReport] = cluster.engine_handle().broadcast("report").results(timeout_s=30)
    return reports


def model_status(cluster: LocalCluster) -> dict:
    return cluster.controller.status()["models"][MODEL]


def all_replicas_follow(cluster: LocalCluster, version: int) -> bool:
    replicas = model_status(cluster)["replicas"].values()
    return len(replicas) == 2 and all(
        not replica["stale"] and replica["applied_version"] == version for replica in replicas
    )


def test_controller_killed(cluster: LocalCluster) -> None:
    """Replicas go on, find the restarted controller, and versions continue."""
    controller = cluster.controller
    controller.set_policy("static", 1)
    before = model_status(cluster)
    until(lambda: all_replicas_follow(cluster, before["version"]))
    old_pid = controller.pid()
    with Traffic(cluster.url) as traffic:
        traffic.wait_for_more(3)
        os.kill(old_pid, signal.SIGKILL)
        traffic.wait_for_more(3)
        until(lambda: controller.pid() != old_pid)
        until(lambda: all_replicas_follow(cluster, model_status(cluster)["version"]))
        traffic.wait_for_more(3)
    assert set(traffic.statuses) == {200}
    after = model_status(cluster)
    assert after["epoch"] > before["epoch"]
    assert after["version"] >= before["version"]
    assert after["policy"] == before["policy"]  # what the operator had set outlives the controller
    controller.set_policy("off")
    assert model_status(cluster)["version"] > after["version"]
    until(lambda: all_replicas_follow(cluster, model_status(cluster)["version"]))
    usage = httpx.post(f"{cluster.url}/v1/completions", json=COMPLETION, timeout=60).json()["usage"]
    assert usage["brownout"]["setting_version"] == model_status(cluster)["version"]


def test_redis_killed_and_restarted(cluster: LocalCluster) -> None:
    """No request fails: routing falls back to Serve's choice, the controller goes on in memory."""
    pid = cluster.redis.pid
    assert pid is not None
    with Traffic(cluster.url) as traffic:
        traffic.wait_for_more(3)
        os.kill(pid, signal.SIGKILL)
        until(lambda: not cluster.controller.status()["redis_ok"])
        traffic.wait_for_more(10)
        cluster.redis.start()
        until(lambda: cluster.controller.status()["redis_ok"])
        traffic.wait_for_more(10)
    assert set(traffic.statuses) == {200}
    assert all_replicas_follow(cluster, model_status(cluster)["version"])


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
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=120) as api:
        streams = [asyncio.create_task(read_stream(api, number, answer)) for number, answer in enumerate(answers)]
        async with asyncio.timeout(60):
            while sum(answer.num_chunks > 0 for answer in answers) < 16:
                await asyncio.sleep(0.01)
        for answer in answers:
            answer.was_streaming_at_kill = answer.num_chunks > 0
        os.kill(victim.pid, signal.SIGKILL)
        async with asyncio.timeout(120):
            await asyncio.gather(*streams)
    failed = [answer for answer in answers if answer.error is not None]
    assert failed, "the victim was streaming something"
    assert all(answer.num_chunks > 0 for answer in failed)
    assert all(answer.error.code == "replica_lost" for answer in failed)
    assert all(answer.finish_reason == "length" for answer in answers if answer.error is None)
    waiting = [answer for answer in answers if not answer.was_streaming_at_kill]
    assert waiting
    assert len(failed) <= 16 + 2  # what the victim could run, and what began while it was being killed

    async with asyncio.timeout(90):  # the replica comes back
        while read_metrics(cluster.url).total("replicas") < 2:
            await asyncio.sleep(0.5)
    reports = await asyncio.to_thread(replica_reports, cluster)
    assert victim.pid not in {report.pid for report in reports}
    await asyncio.to_thread(until, lambda: all_replicas_follow(cluster, model_status(cluster)["version"]))
    metrics = read_metrics(cluster.url)
    assert metrics.total("http_requests_held") == 0
    assert metrics.total("running_requests") == 0 == metrics.total("kv_used_blocks")
