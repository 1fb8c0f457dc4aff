"""An engine that hangs inside a step while its process, its event loop and its connections are well."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import openai
import pytest

from cluster.local import LocalCluster
from tests.e2e import wedging_app
from tests.e2e.conftest import Metrics
from tests.e2e.test_faults import Answer, Traffic, read_stream, replica_reports
from tests.waiting import until

pytestmark = pytest.mark.cluster

NOTICED_S = 8.0  # by design 4.25 s after the last step; the rest is for a machine that is busy with tests
NUM_PLACES = 32  # of both replicas


@contextmanager
def wedging_replicas(cluster: LocalCluster) -> Iterator[None]:
    """The cluster's application with replicas that can be wedged; afterwards as it was."""
    before = cluster.file
    (app,) = before.document["applications"]
    document = {**before.document, "applications": [{**app, "import_path": wedging_app.IMPORT_PATH}]}
    cluster.redeploy(replace(before, document=document))
    try:
        yield
    finally:
        cluster.redeploy(before)


async def test_a_wedged_engine_is_noticed_and_its_replica_replaced(
    cluster: LocalCluster, read_metrics: Callable[[str], Metrics]
) -> None:
    """Streams under way there end with an error, requests without a token go elsewhere, new ones never come there."""
    with wedging_replicas(cluster):
        victim = (await asyncio.to_thread(replica_reports, cluster))[0]
        answers = [Answer() for _ in range(NUM_PLACES + 16)]  # so that some wait for a place on each replica
        async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=120) as api:
            streams = [asyncio.create_task(read_stream(api, number, answer)) for number, answer in enumerate(answers)]
            async with asyncio.timeout(60):
                while sum(answer.num_chunks > 0 for answer in answers) < NUM_PLACES:
                    await asyncio.sleep(0.01)
            wedged = await asyncio.to_thread(
                lambda: cluster.engine_handle().broadcast("wedge", victim.replica_id).results(timeout_s=10)
            )
            assert sorted(wedged) == [False, True]
            wedged_s = time.monotonic()
            for answer in answers:
                answer.was_streaming_at_kill = answer.num_chunks > 0
            async with asyncio.timeout(60):
                while not any(answer.error for answer in answers):
                    await asyncio.sleep(0.01)
            assert time.monotonic() - wedged_s < NOTICED_S
            with Traffic(cluster.url) as traffic:
                await asyncio.to_thread(traffic.wait_for_more, 3)
                async with asyncio.timeout(120):
                    await asyncio.gather(*streams)
                await asyncio.to_thread(until, lambda: is_replaced(cluster, victim.replica_id), 90)
                await asyncio.to_thread(traffic.wait_for_more, 3)
        assert set(traffic.statuses) == {200}
        failed = [answer for answer in answers if answer.error is not None]
        assert all(answer.num_chunks > 0 and answer.error.code == "replica_lost" for answer in failed)
        assert all(answer.finish_reason == "length" for answer in answers if answer.error is None)
        assert [answer for answer in answers if not answer.was_streaming_at_kill], "none waited"
        reports = await asyncio.to_thread(replica_reports, cluster)
        assert victim.pid not in {report.pid for report in reports}
    metrics = read_metrics(cluster.url)
    assert metrics.total("http_requests_held") == metrics.total("running_requests") == 0


def is_replaced(cluster: LocalCluster, replica_id: str) -> bool:
    ids = {report.replica_id for report in replica_reports(cluster)}
    return len(ids) == 2 and replica_id not in ids
