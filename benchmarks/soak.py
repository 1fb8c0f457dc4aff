"""A soak: a cluster at 80 % of its capacity, while clients leave or send nonsense, replicas die and Redis restarts.

At the end every request must be accounted for and nothing may be left over.

    python -m benchmarks.soak --duration-s 600

Two replicas of a tiny model. One request in ten is abandoned, one in twenty is bad. A replica is killed ten times over
the run, Redis restarted twice. The part "soak" of results/serving.json says how the requests ended, what hung and what
leaked. Exit code 1 if anything did.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis
from rich.progress import Progress

from benchmarks.loadgen.client import CompletionClient
from benchmarks.loadgen.closed_loop import ClosedLoop, run_closed_loop, throughput
from benchmarks.loadgen.sse import SseParser
from benchmarks.results import RESULTS, update_result
from benchmarks.tiny import MODEL, tiny_serve_file
from benchmarks.workloads.lengths import LengthRange
from benchmarks.workloads.workload import endless
from cluster.local import LocalCluster
from cluster.processes import free_ports

NUM_REPLICAS = 2
NUM_STREAMS = 64
LOAD = 0.8  # of the capacity measured at the start
ABANDONED_FRAC = 0.10
BAD_FRAC = 0.05
NUM_KILLS = 10
REDIS_RESTARTS = (1 / 3, 2 / 3)  # of the run
REDIS_AWAY_S = 2.0
PROMPT_TOKENS = LengthRange(8, 96)
OUTPUT_TOKENS = LengthRange(32, 160)
HUNG_S = 60.0  # a request that has not ended by then never will
SETTLE_TIMEOUT_S = 90.0
VOCAB_SIZE = 4000
MEMORY_GROWTH_BYTES = 48 * 2**20  # over the second half of the run, by the medians of its quarters; allocators breathe
EXTRA_FDS = 16  # connections that are kept open for a while
BAD_BODIES: tuple[tuple[bytes, int], ...] = (
    (b"{not json", 400),
    (json.dumps({"model": "nobody", "prompt": "x"}).encode(), 404),
    (json.dumps({"model": MODEL, "prompt": [1] * 5000, "max_tokens": 4}).encode(), 400),
    (json.dumps({"model": MODEL, "prompt": "x", "temperature": 9}).encode(), 400),
    (json.dumps({"model": MODEL, "prompt": "x", "max_tokens": "many"}).encode(), 400),
)


@dataclass(slots=True)
class Ledger:
    """How every request ended, as its client saw it."""

    outcomes: Counter[str] = field(default_factory=Counter)
    num_sent: int = 0
    num_hung: int = 0
    unexpected: list[str] = field(default_factory=list)  # the first few

    def note(self, outcome: str, unexpected: str = "") -> None:
        self.outcomes[outcome] += 1
        if unexpected and len(self.unexpected) < 20:
            self.unexpected.append(f"{outcome}: {unexpected}")


class Client:
    """Sends one request of each kind and notes its end."""

    def __init__(self, session: aiohttp.ClientSession, url: str, ledger: Ledger, draw: random.Random) -> None:
        self._session = session
        self._url = f"{url}/v1/completions"
        self._ledger = ledger
        self._draw = draw
        self._requests = endless(PROMPT_TOKENS, OUTPUT_TOKENS, VOCAB_SIZE, draw.randrange(2**31))

    async def send(self) -> None:
        ledger = self._ledger
        ledger.num_sent += 1
        kind = self._draw.random()
        try:
            async with asyncio.timeout(HUNG_S):
                if kind < BAD_FRAC:
                    await self._send_bad(*self._draw.choice(BAD_BODIES))
                else:
                    await self._stream(leaves=kind < BAD_FRAC + ABANDONED_FRAC)
        except TimeoutError:
            ledger.num_hung += 1
            ledger.note("hung", f"no end within {HUNG_S:g} s")
        except (aiohttp.ClientError, OSError) as error:
            ledger.note("connection_error", repr(error))

    async def _send_bad(self, body: bytes, status: int) -> None:
        headers = {"content-type": "application/json"}
        async with self._session.post(self._url, data=body, headers=headers) as response:
            text = await response.text()
            right = response.status == status and "error" in json.loads(text)
            self._ledger.note("refused" if right else "wrong_status", "" if right else f"{response.status} {text}")

    async def _stream(self, leaves: bool) -> None:
        arrival = next(self._requests)
        body = {
            "model": MODEL,
            "prompt": arrival.prompt_ids,
            "max_tokens": arrival.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        leave_after = self._draw.randrange(3) if leaves else sys.maxsize
        parser, num_events, num_tokens = SseParser(), 0, 0
        async with self._session.post(self._url, json=body) as response:
            if response.status != 200:
                return self._refused(response.status, await response.text())
            async for chunk in response.content.iter_any():
                for data in parser.feed(chunk):
                    num_events += 1
                    if data == b"[DONE]":
                        right = num_tokens == arrival.max_tokens
                        return self._ledger.note("ok" if right else "wrong_length", "" if right else f"{num_tokens}")
                    event = json.loads(data)
                    if event.get("error"):
                        return self._failed(event["error"])
                    num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
                if num_events > leave_after:
                    return self._ledger.note("abandoned")  # leaving the block closes the connection
        return self._ledger.note("cut_off", "the stream ended without [DONE]")

    def _refused(self, status: int, text: str) -> None:
        if status in (429, 503):
            return self._ledger.note("busy")
        code = json.loads(text).get("error", {}).get("code")
        if code == "replica_lost":
            return self._ledger.note("replica_lost")
        return self._ledger.note("wrong_status", f"{status} {text}")

    def _failed(self, error: dict[str, Any]) -> None:
        known = error["code"] == "replica_lost"
        return self._ledger.note("replica_lost" if known else "stream_error", "" if known else json.dumps(error))


@dataclass(frozen=True, slots=True)
class ProcessSample:
    """Of the ingress, which lives through the whole run."""

    at_s: float
    rss_bytes: int
    num_fds: int


def sample_process(pid: int, at_s: float) -> ProcessSample:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return ProcessSample(at_s, pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd")))


def running_pids(cluster: LocalCluster, deployment: str) -> list[int]:
    """Of the replicas that serve."""
    app = cluster.serve_details()["applications"][cluster.file.app_name]
    replicas = app["deployments"].get(deployment, {"replicas": []})["replicas"]
    return [replica["pid"] for replica in replicas if replica["state"] == "RUNNING" and replica["pid"]]


class Faults:
    """Kills replicas and restarts Redis on time; told apart from the load, which goes on."""

    def __init__(self, cluster: LocalCluster, duration_s: float, num_kills: int, draw: random.Random) -> None:
        self._cluster = cluster
        self._num_kills_planned = num_kills
        self._duration_s = duration_s
        self._draw = draw
        self.num_kills = 0
        self.num_redis_restarts = 0

    async def run(self) -> None:
        planned = self._num_kills_planned
        kills = [(self._duration_s * (n + 0.5) / planned, self._kill) for n in range(planned)]
        restarts = [(self._duration_s * share, self._restart_redis) for share in REDIS_RESTARTS]
        started_s = time.monotonic()
        for at_s, fault in sorted([*kills, *restarts], key=lambda pair: pair[0]):
            await asyncio.sleep(max(0.0, started_s + at_s - time.monotonic()))
            await asyncio.to_thread(fault)

    def _kill(self) -> None:
        pids = running_pids(self._cluster, "EngineReplica")
        if len(pids) == NUM_REPLICAS:  # never the last one: a cluster without replicas serves nobody
            os.kill(self._draw.choice(sorted(pids)), signal.SIGKILL)
            self.num_kills += 1

    def _restart_redis(self) -> None:
        pid = self._cluster.redis.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        time.sleep(REDIS_AWAY_S)
        self._cluster.redis.start()
        self.num_redis_restarts += 1


async def measure_capacity_tok_s(url: str, measure_s: float) -> float:
    async with CompletionClient(url, MODEL, HUNG_S) as client:
        spec = ClosedLoop(NUM_STREAMS, ramp_s=2.0, measure_s=measure_s)
        requests = endless(PROMPT_TOKENS, OUTPUT_TOKENS, VOCAB_SIZE, 1)
        return throughput(await run_closed_loop(client.send, requests, spec), spec).tok_s


async def offer(client: Client, req_s: float, duration_s: float, draw: random.Random, progress: Progress) -> None:
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


async def watch_process(pid: int, samples: list[ProcessSample], period_s: float) -> None:
    started_s = time.monotonic()
    while True:
        samples.append(sample_process(pid, time.monotonic() - started_s))
        await asyncio.sleep(period_s)


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
    req_s = LOAD * capacity_tok_s / OUTPUT_TOKENS.mean
    ledger, samples, faults = Ledger(), [], Faults(cluster, duration_s, num_kills, draw)
    watching = asyncio.create_task(watch_process(ingress_pid, samples, duration_s / 100))
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        client = Client(session, cluster.url, ledger, draw)
        faulting = asyncio.create_task(faults.run())
        await offer(client, req_s, duration_s, draw, progress)
        await faulting
    watching.cancel()
    after = await settled(cluster, ingress_pid, fds_before + EXTRA_FDS)
    counted = after["http_requests"] - before["http_requests"]
    leaked = {
        "unaccounted_requests": abs(ledger.num_sent - sum(ledger.outcomes.values())) + abs(ledger.num_sent - counted),
        "slots": after["running_requests"] + after["waiting_requests"] + after["http_requests_held"],
        "blocks": after["kv_used_blocks"],
        "fds": max(0, sample_process(ingress_pid, 0.0).num_fds - fds_before - EXTRA_FDS),
        "redis_keys": await asyncio.to_thread(num_foreign_keys, cluster),
        "memory_bytes": memory_growth_bytes(samples),
    }
    return {
        "requests": ledger.num_sent,
        "hung": ledger.num_hung,
        "leaked": sum(count for kind, count in leaked.items() if kind != "memory_bytes")
        + (leaked["memory_bytes"] > MEMORY_GROWTH_BYTES),
        "outcomes": dict(ledger.outcomes),
        "leaks_by_kind": leaked,
        "unexpected": ledger.unexpected,
        "duration_s": duration_s,
        "seed": seed,
        "capacity_tok_s": capacity_tok_s,
        "offered_req_s": req_s,
        "replicas_killed": faults.num_kills,
        "redis_restarts": faults.num_redis_restarts,
        "ingress": [asdict(sample) for sample in samples[:: max(1, len(samples) // 20)]],
    }


async def settled(cluster: LocalCluster, ingress_pid: int, max_fds: int) -> dict[str, int]:
    """The cluster's own account once nothing is under way, or as it is after SETTLE_TIMEOUT_S.

    HAProxy keeps idle connections to the ingress for half a minute, hence the wait for file descriptors.
    """
    deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
    async with aiohttp.ClientSession() as session:
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
    """Router keys in Redis that belong to no replica that runs."""
    time.sleep(3.0)  # longer than any lease
    with Redis.from_url(cluster.redis.url) as store:
        return max(0, sum(1 for _ in store.scan_iter("*:router}*")) - NUM_REPLICAS)


def memory_growth_bytes(samples: Sequence[ProcessSample]) -> int:
    """Of the ingress from the third quarter of the run to the last, by their medians."""
    quarter = max(1, len(samples) // 4)
    third, last = samples[2 * quarter : 3 * quarter], samples[3 * quarter :]
    if not third or not last:
        return 0
    return int(statistics.median(s.rss_bytes for s in last) - statistics.median(s.rss_bytes for s in third))


def run(duration_s: float, seed: int, num_kills: int = NUM_KILLS) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory, Progress(transient=True) as progress:
        serve_file = tiny_serve_file(Path(directory), replicas=NUM_REPLICAS)
        with LocalCluster.start(serve_file, port=free_ports(1)[0]) as cluster:
            return asyncio.run(soak(cluster, duration_s, seed, num_kills, progress))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--duration-s", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "serving.json")
    arguments = parser.parse_args()
    figures = run(arguments.duration_s, arguments.seed)
    update_result(arguments.out, {"soak": figures})
    print(json.dumps({key: value for key, value in figures.items() if key != "ingress"}, indent=2))
    failed = figures["hung"] or figures["leaked"] or figures["unexpected"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
