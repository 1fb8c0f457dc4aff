"""One soak: load and faults together, then the account of what is left."""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp
from rich.progress import Progress

from benchmarks.loadgen.client import CompletionClient
from benchmarks.loadgen.closed_loop import ClosedLoop, measure_throughput
from benchmarks.soak.faults import NUM_REPLICAS, Faults, running_pids
from benchmarks.soak.leftovers import (
    EXTRA_FDS,
    MEMORY_GROWTH_BYTES,
    memory_growth_bytes,
    num_foreign_keys,
    sample_process,
    settled,
    watch_process,
)
from benchmarks.soak.requests import HUNG_S, KINDS, OUTPUT_TOKENS, PROMPT_TOKENS, VOCAB_SIZE, Endings, SoakClient
from benchmarks.tiny import MODEL, tiny_serve_file
from benchmarks.workloads.workload import endless
from cluster.local.cluster import LocalCluster
from cluster.local.processes import free_ports

NUM_STREAMS = 64
MIN_MEASURED = 16  # answers: of fewer a capacity says little, and of none nothing
LOAD = 0.8  # of the capacity measured at the start
MIN_REQUESTS = 4 * len(KINDS)  # also on a machine that has hardly any time for them: of every kind, some
NUM_KILLS = 10


def run(duration_s: float, seed: int, num_kills: int = NUM_KILLS) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory, Progress(transient=True) as progress:
        serve_file = tiny_serve_file(Path(directory), replicas=NUM_REPLICAS)
        with patient_proxy(), LocalCluster.start(serve_file, port=free_ports(1)[0]) as cluster:
            return asyncio.run(soak(cluster, duration_s, seed, num_kills, progress))


@contextmanager
def patient_proxy() -> Iterator[None]:
    """See deploy/ray/haproxy.sh: it answers 408 to clients that are slow to send, and ours share the machine with all
    that they load."""
    before = os.environ.get("HEADER_TIMEOUT_S")
    os.environ["HEADER_TIMEOUT_S"] = f"{HUNG_S:.0f}"
    try:
        yield
    finally:
        del os.environ["HEADER_TIMEOUT_S"]
        if before is not None:
            os.environ["HEADER_TIMEOUT_S"] = before


async def soak(
    cluster: LocalCluster, duration_s: float, seed: int, num_kills: int, progress: Progress
) -> dict[str, Any]:
    """The figures of one run; "leaked" counts what is left over, by kind."""
    draw = random.Random(seed)
    (ingress_pid,) = await asyncio.to_thread(running_pids, cluster, "Ingress")
    capacity_tok_s = await measure_capacity_tok_s(cluster.url, min(10.0, duration_s / 5))
    await asyncio.sleep(1.0)
    before = await settled(cluster, ingress_pid, 0)
    fds_before = sample_process(ingress_pid, 0.0).num_fds
    req_s = max(LOAD * capacity_tok_s / OUTPUT_TOKENS.mean, MIN_REQUESTS / duration_s)
    endings, samples, faults = Endings(), [], Faults(cluster, duration_s, num_kills, draw)
    watching = asyncio.create_task(watch_process(ingress_pid, samples, duration_s / 100))
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        client = SoakClient(session, cluster.url, endings, draw)
        faulting = asyncio.create_task(faults.run())
        await offer(client, req_s, duration_s, draw, progress)
        await faulting
    watching.cancel()
    after = await settled(cluster, ingress_pid, fds_before + EXTRA_FDS)
    sent, counted = endings.num_sent, after["http_requests"] - before["http_requests"] + endings.num_by_proxy
    leaked = {
        "unaccounted_requests": abs(sent - sum(endings.outcomes.values())) + abs(sent - counted),
        "slots": after["running_requests"] + after["waiting_requests"] + after["http_requests_held"],
        "blocks": after["kv_used_blocks"],
        "fds": max(0, sample_process(ingress_pid, 0.0).num_fds - fds_before - EXTRA_FDS),
        "redis_keys": await asyncio.to_thread(num_foreign_keys, cluster),
        "memory_bytes": memory_growth_bytes(samples),
    }
    return {
        "requests": sent,
        "hung": endings.num_hung,
        "leaked": sum(count for kind, count in leaked.items() if kind != "memory_bytes")
        + (leaked["memory_bytes"] > MEMORY_GROWTH_BYTES),
        "outcomes": dict(endings.outcomes),
        "leaks_by_kind": leaked,
        "unexpected": endings.unexpected,
        "duration_s": duration_s,
        "seed": seed,
        "capacity_tok_s": capacity_tok_s,
        "offered_req_s": req_s,
        "replicas_killed": faults.num_kills,
        "redis_restarts": faults.num_redis_restarts,
        "ingress": [asdict(sample) for sample in samples[:: max(1, len(samples) // 20)]],
    }


async def measure_capacity_tok_s(url: str, measure_s: float) -> float:
    async with CompletionClient(url, MODEL, HUNG_S) as client:
        spec = ClosedLoop(NUM_STREAMS, ramp_s=2.0, measure_s=measure_s)
        requests = endless(PROMPT_TOKENS, OUTPUT_TOKENS, VOCAB_SIZE, 1)
        return (await measure_throughput(client.send, requests, spec, MIN_MEASURED, HUNG_S)).tok_s


async def offer(client: SoakClient, req_s: float, duration_s: float, draw: random.Random, progress: Progress) -> None:
    """Poisson arrivals for ``duration_s``, then wait for every request's end."""
    bar = progress.add_task("soak", total=duration_s)
    started_s = time.monotonic()
    due_s = 0.0
    async with asyncio.TaskGroup() as group:
        while (due_s := due_s + draw.expovariate(req_s)) < duration_s:
            await asyncio.sleep(max(0.0, started_s + due_s - time.monotonic()))
            group.create_task(client.send())
            progress.update(bar, completed=due_s)
    progress.update(bar, completed=duration_s)
