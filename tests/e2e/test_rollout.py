"""Changes of a running application: no request fails, long streams included. Each test leaves the cluster as it was."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import openai
import pytest

from cluster.local import LocalCluster
from cluster.serve_file import ServeFile
from tests.e2e.conftest import Metrics
from tests.e2e.test_faults import Answer, Traffic, read_stream, replica_reports
from tests.waiting import until

pytestmark = pytest.mark.cluster


@contextmanager
def restored(cluster: LocalCluster) -> Iterator[None]:
    try:
        yield
    finally:
        cluster.deploy(cluster.file)
        until(lambda: is_deployed(cluster, 2), timeout_s=120)


def is_deployed(cluster: LocalCluster, num_replicas: int) -> bool:
    app = cluster.serve_details()["applications"]["brownoutserve"]
    engines = app["deployments"].get("EngineReplica", {"replicas": []})  # none for an instant after a deploy
    num_running = sum(replica["state"] == "RUNNING" for replica in engines["replicas"])
    return app["status"] == "RUNNING" and num_running == num_replicas


async def streams_during(cluster: LocalCluster, change: Callable[[], None]) -> list[Answer]:
    """Answers of long streams that were under way when ``change`` began."""
    answers = [Answer() for _ in range(12)]
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=120) as api:
        streams = [asyncio.create_task(read_stream(api, number, answer)) for number, answer in enumerate(answers)]
        while not all(answer.num_chunks for answer in answers):
            await asyncio.sleep(0.01)
        await asyncio.to_thread(change)
        await asyncio.gather(*streams)
    return answers


async def test_rolling_update_and_scale_down(
    cluster: LocalCluster, serve_file: Callable[..., ServeFile], read_metrics: Callable[[str], Metrics]
) -> None:
    """Every engine replica is replaced, then all but one taken away."""
    address = cluster.file.document["http_options"]
    updated = serve_file(scheduler={"max_num_seqs": 16, "max_num_batched_tokens": 48}).on(**address)
    smaller = serve_file(scheduler={"max_num_seqs": 16, "max_num_batched_tokens": 48}, replicas=1).on(**address)
    old_pids = {report.pid for report in await asyncio.to_thread(replica_reports, cluster)}

    def update() -> None:
        cluster.deploy(updated)
        until(lambda: is_deployed(cluster, 2) and not old_pids & {r.pid for r in replica_reports(cluster)}, 120)

    def shrink() -> None:
        cluster.deploy(smaller)
        until(lambda: is_deployed(cluster, 1), 60)

    with restored(cluster):
        for change in (update, shrink):
            with Traffic(cluster.url) as traffic:
                await asyncio.to_thread(traffic.wait_for_more, 2)
                answers = await streams_during(cluster, change)
                await asyncio.to_thread(traffic.wait_for_more, 2)
            assert set(traffic.statuses) == {200}
            assert [answer.finish_reason for answer in answers] == ["length"] * len(answers), answers
    assert read_metrics(cluster.url).total("http_requests_held") == 0


async def test_a_hung_replica_is_noticed_and_replaced(cluster: LocalCluster) -> None:
    """It neither answers nor dies. Streams end with an error, requests that have not begun are served elsewhere."""
    victim = (await asyncio.to_thread(replica_reports, cluster))[0]
    answers = [Answer() for _ in range(24)]
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=60) as api:
        streams = [asyncio.create_task(read_stream(api, number, answer)) for number, answer in enumerate(answers)]
        while not all(answer.num_chunks for answer in answers):
            await asyncio.sleep(0.01)
        os.kill(victim.pid, signal.SIGSTOP)
        stopped_s = time.monotonic()
        late = [Answer() for _ in range(4)]
        streams += [asyncio.create_task(read_stream(api, 50 + number, answer)) for number, answer in enumerate(late)]
        await asyncio.gather(*streams)
    lost = [answer for answer in answers if answer.error is not None]
    assert lost
    assert all(answer.error.code == "replica_lost" for answer in lost)
    assert all(answer.finish_reason == "length" for answer in (*answers, *late) if answer not in lost)
    assert time.monotonic() - stopped_s < 60  # far below any timeout of a request
    os.kill(victim.pid, signal.SIGKILL)  # Serve's own checks would do so some seconds later
    await asyncio.to_thread(until, lambda: is_deployed(cluster, 2), 90)
