"""Keys, rates and queues through the whole path: Ray, HAProxy, two ingress processes, Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from cluster.admission.key_store import FileKeyStore
from cluster.admission.keys import new_key
from cluster.local.cluster import LocalCluster
from cluster.serve_file import ServeFile
from tests.e2e.conftest import ADMIN_TOKEN, MODEL, Metrics
from tests.waiting import until

pytestmark = pytest.mark.cluster

COMPLETION = {"model": MODEL, "prompt": "Hello", "max_tokens": 4, "temperature": 0}
LIMIT = 10  # requests per minute of "rated"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of each tenant; "file": where they are kept."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    made = {"file": str(file)}
    for tenant in ("rated", "flood", "calm"):
        made[tenant], record = new_key(tenant, time.time())
        FileKeyStore(file).add(record)
    return made


@pytest.fixture(scope="module")
def guarded(serve_file: Callable[..., ServeFile], keys: dict[str, str]) -> Iterator[LocalCluster]:
    admission = {
        "keys_file": keys["file"],
        "tenants": {
            "rated": {"requests_per_minute": LIMIT},
            "flood": {"max_concurrent": 2, "max_queued": 200, "ttft_s": 60.0},
        },
    }
    ingress = {"num_replicas": 2, "admin_token": ADMIN_TOKEN}
    with LocalCluster.start(serve_file(admission=admission, ingress=ingress, replicas=1)) as cluster:
        yield cluster


def client(cluster: LocalCluster, key: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key=key, max_retries=0, timeout=120)


async def test_a_key_opens_and_its_end_closes(guarded: LocalCluster, keys: dict[str, str]) -> None:
    assert httpx.post(f"{guarded.url}/v1/completions", json=COMPLETION, timeout=60).status_code == 401
    assert httpx.get(f"{guarded.url}/metrics", timeout=60).status_code == 403
    key, record = new_key("guest", time.time())
    store = FileKeyStore(Path(keys["file"]))
    store.add(record)
    headers = {"authorization": f"Bearer {key}"}

    def statuses() -> set[int]:
        answers = [httpx.get(f"{guarded.url}/v1/models", headers=headers, timeout=60) for _ in range(8)]
        return {answer.status_code for answer in answers}

    until(lambda: statuses() == {200})
    store.remove(record.key_id)
    until(lambda: statuses() == {401})


async def test_both_ingress_processes_share_one_rate(guarded: LocalCluster, keys: dict[str, str]) -> None:
    api = client(guarded, keys["calm"])
    await asyncio.gather(*(api.completions.create(**COMPLETION) for _ in range(16)))  # both have been asked something
    rated, begun_s = client(guarded, keys["rated"]), time.monotonic()
    first = await rated.completions.create(**COMPLETION)
    assert first.usage.completion_tokens == 4
    answers = await asyncio.gather(
        *(rated.completions.create(**COMPLETION) for _ in range(3 * LIMIT)), return_exceptions=True
    )
    granted = [answer for answer in answers if not isinstance(answer, BaseException)]
    refused = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
    assert len(granted) + len(refused) == 3 * LIMIT
    # A process that Redis answers too late goes by its own part, half of the rate; what Redis takes then is lost.
    flowed_in = (time.monotonic() - begun_s) * LIMIT / 60
    assert LIMIT // 2 - 1 <= len(granted) <= LIMIT + LIMIT // 2 + flowed_in
    assert all(int(answer.response.headers["retry-after"]) >= 1 for answer in refused)


async def test_a_flood_waits_in_its_own_queue(
    guarded: LocalCluster, keys: dict[str, str], read_metrics: Callable[..., Metrics]
) -> None:
    def num_waiting() -> float:
        return read_metrics(guarded.url, ADMIN_TOKEN).total("admission_waiting_requests", tenant="flood")

    long = {**COMPLETION, "max_tokens": 400, "extra_body": {"ignore_eos": True}}
    flood = [asyncio.create_task(client(guarded, keys["flood"]).completions.create(**long)) for _ in range(48)]
    await asyncio.to_thread(until, lambda: num_waiting() >= 10)  # one of the two ingress processes has answered
    answer = await client(guarded, keys["calm"]).completions.create(**COMPLETION)
    assert answer.usage.completion_tokens == 4
    assert (await asyncio.to_thread(read_metrics, guarded.url, ADMIN_TOKEN)).total("running_requests") <= 2
    assert sum(task.done() for task in flood) < 40  # and not after all of them
    for task in flood:
        task.cancel()
    await asyncio.gather(*flood, return_exceptions=True)
