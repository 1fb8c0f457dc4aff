"""Changes of a running application: no request fails, long streams included. Each test leaves the cluster as it was."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress

import openai
import pytest

from cluster.local.cluster import LocalCluster
from cluster.serve_file import ServeFile
from tests.e2e.conftest import NUM_REPLICAS, Metrics, running_replicas
from tests.e2e.test_faults import Answer, Traffic, is_replaced, nothing_is_held, read_stream, replica_reports
from tests.waiting import until, until_async

pytestmark = pytest.mark.cluster


async def streams_during(cluster: LocalCluster, change: Callable[[], None]) -> list[Answer]:
    """Answers of long streams that were under way when ``change`` began."""
    answers = [Answer() for _ in range(12)]
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=300) as api:
        streams = [asyncio.create_task(read_stream(api, number, answer)) for number, answer in enumerate(answers)]
        await until_async(lambda: all(answer.num_chunks for answer in answers))
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
    await asyncio.to_thread(until, lambda: len(running_replicas(cluster)) == NUM_REPLICAS)
    old = set(cluster.replica_ids())

    def update() -> None:
        cluster.deploy(updated)
        until(lambda: len(now := set(running_replicas(cluster))) == 2 and not old & now)

    def shrink() -> None:
        cluster.deploy(smaller)
        until(lambda: len(running_replicas(cluster)) == 1)

    try:
        for change in (update, shrink):
            with Traffic(cluster.url) as traffic:
                await asyncio.to_thread(traffic.wait_for_more, 2)
                answers = await streams_during(cluster, change)
                await asyncio.to_thread(traffic.wait_for_more, 2)
            assert set(traffic.statuses) == {200}
            assert [answer.finish_reason for answer in answers] == ["length"] * len(answers), answers
    finally:
        await asyncio.to_thread(cluster.redeploy, cluster.file)
    await asyncio.to_thread(until, lambda: nothing_is_held(read_metrics(cluster.url)))


async def test_a_hung_replica_is_noticed_and_replaced(cluster: LocalCluster) -> None:
    """It neither answers nor dies. Streams end with an error, requests that have not begun are served elsewhere."""
    victim = (await asyncio.to_thread(replica_reports, cluster))[0]
    answers = [Answer() for _ in range(24)]
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=300) as api:
        streams = [asyncio.create_task(read_stream(api, number, answer)) for number, answer in enumerate(answers)]
        await until_async(lambda: all(answer.num_chunks for answer in answers))
        os.kill(victim.pid, signal.SIGSTOP)
        late = [Answer() for _ in range(4)]
        streams += [asyncio.create_task(read_stream(api, 50 + number, answer)) for number, answer in enumerate(late)]
        await asyncio.gather(*streams)
    lost = [answer for answer in answers if answer.error is not None]
    assert lost
    assert all(answer.error.code == "replica_lost" for answer in lost), "noticed, not timed out"
    assert all(answer.finish_reason == "length" for answer in (*answers, *late) if answer not in lost)
    with suppress(ProcessLookupError):
        os.kill(victim.pid, signal.SIGKILL)  # unless Serve's own checks have done so
    await asyncio.to_thread(until, lambda: is_replaced(cluster, victim.replica_id))
