"""An engine that hangs inside a step while its process, its event loop and its connections are well."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import openai
import pytest

from cluster.local.cluster import LocalCluster
from tests.e2e import wedging_app
from tests.e2e.conftest import Metrics
from tests.e2e.test_faults import Answer, Traffic, is_replaced, nothing_is_held, read_stream, replica_reports
from tests.waiting import until, until_async

pytestmark = pytest.mark.cluster

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
        async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=300) as api:
            streams = [asyncio.create_task(read_stream(api, number, answer)) for number, answer in enumerate(answers)]
            await until_async(lambda: sum(answer.num_chunks > 0 for answer in answers) >= NUM_PLACES)
            for answer in answers:
                answer.was_streaming_at_kill = answer.num_chunks > 0
            wedged = await asyncio.to_thread(
                lambda: cluster.engine_handle().broadcast("wedge", victim.replica_id).results(timeout_s=60)
            )
            assert sorted(wedged) == [False, True]
            await until_async(lambda: any(answer.error for answer in answers))
            with Traffic(cluster.url) as traffic:
                await asyncio.to_thread(traffic.wait_for_more, 3)
                async with asyncio.timeout(300):
                    await asyncio.gather(*streams)
                await asyncio.to_thread(until, lambda: is_replaced(cluster, victim.replica_id))
                await asyncio.to_thread(traffic.wait_for_more, 3)
        assert set(traffic.statuses) == {200}
        failed = [answer for answer in answers if answer.error is not None]
        assert all(answer.num_chunks > 0 and answer.error.code == "replica_lost" for answer in failed)
        assert all(answer.finish_reason == "length" for answer in answers if answer.error is None)
        assert [answer for answer in answers if not answer.was_streaming_at_kill], "none waited"
    await asyncio.to_thread(until, lambda: nothing_is_held(read_metrics(cluster.url)))
