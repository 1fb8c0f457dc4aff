"""What a soak may not leave behind: places, KV blocks, file descriptors, keys in Redis, memory of the ingress."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from benchmarks.soak.faults import NUM_REPLICAS
from cluster.local.cluster import LocalCluster

SETTLE_TIMEOUT_S = 180.0
KEYS_TIMEOUT_S = 30.0  # many times any lease
MEMORY_GROWTH_BYTES = 48 * 2**20  # over the second half of the run, by the medians of its quarters; allocators breathe
EXTRA_FDS = 16  # connections that are kept open for a while


@dataclass(frozen=True, slots=True)
class ProcessSample:
    """Of the ingress, which lives through the whole run."""

    at_s: float
    rss_bytes: int
    num_fds: int


def sample_process(pid: int, at_s: float) -> ProcessSample:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return ProcessSample(at_s, pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd")))


async def watch_process(pid: int, samples: list[ProcessSample], period_s: float) -> None:
    started_s = time.monotonic()
    while True:
        samples.append(sample_process(pid, time.monotonic() - started_s))
        await asyncio.sleep(period_s)


async def settled(cluster: LocalCluster, ingress_pid: int, max_fds: int) -> dict[str, int]:
    """The cluster's own account once nothing is under way, or as it is after SETTLE_TIMEOUT_S.

    HAProxy keeps idle connections to the ingress for half a minute, hence the wait for file descriptors.
    """
    deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
    # Each look on a connection of its own: the proxy may close a kept one at the moment of the next look.
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        while True:
            async with session.get(f"{cluster.url}/metrics") as response:
                metrics = totals(await response.text())
            quiet = not (metrics["http_requests_held"] or metrics["running_requests"] or metrics["kv_used_blocks"])
            whole = metrics["replicas"] == NUM_REPLICAS
            idle = not max_fds or sample_process(ingress_pid, 0.0).num_fds <= max_fds
            if (quiet and whole and idle) or time.monotonic() > deadline_s:
                return metrics
            await asyncio.sleep(0.5)


def totals(page: str) -> dict[str, int]:
    """Sums over all series of the metrics that count."""
    names = ("replicas", "running_requests", "waiting_requests", "kv_used_blocks", "http_requests_held")
    sums: Counter[str] = Counter(dict.fromkeys((*names, "http_requests"), 0))
    for family in text_string_to_metric_families(page):
        for metric in family.samples:
            name = metric.name.removeprefix("brownoutserve_").removesuffix("_total")
            if name in names or (name == "http_requests" and metric.labels.get("endpoint") == "completions"):
                sums[name] += int(metric.value)
    return dict(sums)


def num_foreign_keys(cluster: LocalCluster) -> int:
    """Router keys in Redis that belong to no replica that runs, and stay."""
    deadline_s = time.monotonic() + KEYS_TIMEOUT_S
    with Redis.from_url(cluster.redis.url) as store:
        while (num_foreign := len(set(store.scan_iter("*:router}*"))) - NUM_REPLICAS) > 0:
            if time.monotonic() > deadline_s:
                return num_foreign
            time.sleep(0.2)
    return 0


def memory_growth_bytes(samples: Sequence[ProcessSample]) -> int:
    """Of the ingress from the third quarter of the run to the last, by their medians."""
    quarter = max(1, len(samples) // 4)
    third, last = samples[2 * quarter : 3 * quarter], samples[3 * quarter :]
    if not third or not last:
        return 0
    return int(statistics.median(s.rss_bytes for s in last) - statistics.median(s.rss_bytes for s in third))
