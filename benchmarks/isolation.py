"""Isolation: what one tenant's flood does to the time to first token of another that behaves.

    python -m benchmarks.isolation

A live cluster with a tiny model. The calm tenant sends Poisson arrivals; in every other part of the run the flooding
tenant keeps 128 streams open beside it, twice as many as the engine has places, each sending its next request as soon
as the last is answered. The flood comes from a process of its own. Once without admission, and then with: API keys,
and for the flooding tenant `max_concurrent: 1`. The calm arrivals are the same in both parts of a round, and what is
compared is the p90 of these two; the median over the rounds counts, as other work of the machine hits single parts.

Saved in results/isolation.json. Exit code 1 if, with admission, the flood moves the calm p90 by more than 10 %.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from rich.progress import Progress, TaskID

from benchmarks.loadgen.client import CompletionClient
from benchmarks.loadgen.closed_loop import ClosedLoop, run_closed_loop
from benchmarks.loadgen.open_loop import run_open_loop
from benchmarks.loadgen.record import Clock, RequestRecord
from benchmarks.report import nearest_rank
from benchmarks.results import RESULTS, markdown_table, result_file, write_result
from benchmarks.tiny import MODEL, tiny_serve_file
from benchmarks.workloads.arrivals import RatePhase, draw_times
from benchmarks.workloads.lengths import LengthRange
from benchmarks.workloads.workload import Arrival, endless, synthesize
from cluster.admission.key_store import FileKeyStore
from cluster.admission.keys import new_key
from cluster.local.cluster import LocalCluster
from cluster.local.processes import free_ports
from cluster.serve_file import ServeFile

ALLOWED_RATIO = 1.10
CALM_PROMPT, CALM_OUTPUT = LengthRange(16, 64), LengthRange(32, 96)
FLOOD_PROMPT, FLOOD_OUTPUT = LengthRange(16, 64), LengthRange(192, 320)
FLOOD_STREAMS = 128
FLOOD_LEAD_S = 2.0  # the flood has risen before the calm arrivals count
VOCAB_SIZE = 4000
TIMEOUT_S = 120.0
ADMIN_TOKEN = "benchmark"
ADMISSION: dict[str, Any] = {"tenants": {"flood": {"max_concurrent": 1, "max_queued": 256}}}


@dataclass(frozen=True, slots=True)
class Plan:
    calm_req_s: float
    measure_s: float
    rounds: int
    seed: int

    def arrivals(self, number: int) -> tuple[Arrival, ...]:
        """The calm tenant's in one part of round ``number``."""
        seed = self.seed + number
        times_s = draw_times([RatePhase(self.measure_s, self.calm_req_s)], seed)
        return synthesize(times_s, self.measure_s, CALM_PROMPT, CALM_OUTPUT, VOCAB_SIZE, seed).arrivals


def flood(url: str, api_key: str, duration_s: float, seed: int) -> dict[str, Any]:
    """Runs in a process of its own; how many of its requests ended how, and the tokens it got."""

    records: list[RequestRecord] = []

    async def run() -> None:
        async with CompletionClient(url, MODEL, TIMEOUT_S, api_key) as client:

            async def send(arrival: Arrival, clock: Clock) -> RequestRecord:
                records.append(await client.send(arrival, clock))
                return records[-1]

            requests = endless(FLOOD_PROMPT, FLOOD_OUTPUT, VOCAB_SIZE, seed)
            spec = ClosedLoop(FLOOD_STREAMS, ramp_s=1.0, measure_s=duration_s - 1.0)
            with suppress(TimeoutError):  # what still waits then is given up
                async with asyncio.timeout(duration_s):
                    await run_closed_loop(send, requests, spec)

    asyncio.run(run())
    completed = [record for record in records if record.completed]
    return {
        "outcomes": dict(Counter(record.outcome.value for record in records)),
        "tok_s": sum(record.num_tokens for record in completed) / duration_s,
    }


async def measure(url: str, keys: dict[str, str], plan: Plan, progress: Progress, task: TaskID) -> dict[str, Any]:
    """The calm tenant alone and beside the flood, in turns."""
    alone: list[RequestRecord] = []
    beside: list[RequestRecord] = []
    rounds: list[dict[str, float]] = []
    floods: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        await loop.run_in_executor(pool, flood, url, keys.get("flood", ""), 2.0, plan.seed)  # imports, first steps
        async with CompletionClient(url, MODEL, TIMEOUT_S, keys.get("calm", "")) as client:
            await run_open_loop(client.send, plan.arrivals(-1)[: int(plan.calm_req_s)])
            for number in range(plan.rounds):
                arrivals = plan.arrivals(number)
                quiet = await run_open_loop(client.send, arrivals)
                progress.advance(task)
                duration_s = FLOOD_LEAD_S + plan.measure_s + 1.0
                flooding = loop.run_in_executor(pool, flood, url, keys.get("flood", ""), duration_s, plan.seed + number)
                await asyncio.sleep(FLOOD_LEAD_S)
                flooded = await run_open_loop(client.send, arrivals)
                floods.append(await flooding)
                await settled(url)
                progress.advance(task)
                alone += quiet
                beside += flooded
                rounds.append({"alone": 1e3 * _p(quiet, 90), "beside_flood": 1e3 * _p(flooded, 90)})
    return {
        "alone": _figures(alone),
        "beside_flood": _figures(beside),
        "p90_ratio": statistics.median(each["beside_flood"] / each["alone"] for each in rounds),
        "p90_ratio_pooled": _p(beside, 90) / _p(alone, 90),
        "ttft_p90_ms_by_round": rounds,
        "flood": floods,
    }


async def settled(url: str) -> None:
    """Nothing is left of the flood."""
    async with aiohttp.ClientSession() as session:
        deadline_s = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline_s:
            async with session.get(f"{url}/metrics", headers={"authorization": f"Bearer {ADMIN_TOKEN}"}) as response:
                page = await response.text()
            held = [line for line in page.splitlines() if line.startswith("brownoutserve_http_requests_held{")]
            if held and all(float(line.rsplit(" ", 1)[1]) == 0 for line in held):
                return
            await asyncio.sleep(0.2)
    raise RuntimeError("the flood's requests have not ended")


def _p(records: Sequence[RequestRecord], percent: float) -> float:
    return nearest_rank([min(record.ttft_s, TIMEOUT_S) for record in records], percent)


def _figures(records: Sequence[RequestRecord]) -> dict[str, Any]:
    """A request that failed has waited for ever, as far as percentiles go; here TIMEOUT_S stands for that."""
    return {
        "requests": len(records),
        "failed": sum(not record.completed for record in records),
        "errors": sorted({record.error for record in records if record.error})[:5],
        "ttft_ms": {f"p{percent}": 1e3 * _p(records, percent) for percent in (50, 90, 99)},
    }


def serve_file(directory: Path, with_admission: bool) -> tuple[ServeFile, dict[str, str]]:
    """The application, and the tenants' keys."""
    ingress = {"admin_token": ADMIN_TOKEN}
    if not with_admission:
        return tiny_serve_file(directory, ingress=ingress), {}
    store, keys = FileKeyStore(directory / "keys.json"), {}
    for tenant in ("calm", "flood"):
        keys[tenant], record = new_key(tenant, time.time())
        store.add(record)
    admission = {**ADMISSION, "keys_file": str(directory / "keys.json")}
    return tiny_serve_file(directory, ingress=ingress, admission=admission), keys


def run(plan: Plan, without_rounds: int) -> dict[str, Any]:
    """Both parts: "without_admission" and "with_admission"."""
    figures: dict[str, Any] = {}
    with Progress(transient=True) as progress:
        for name, with_admission, rounds in (
            ("without_admission", False, without_rounds),
            ("with_admission", True, plan.rounds),
        ):
            task = progress.add_task(name, total=2 * rounds)
            of_part = Plan(plan.calm_req_s, plan.measure_s, rounds, plan.seed)
            with tempfile.TemporaryDirectory() as directory:
                file, keys = serve_file(Path(directory), with_admission)
                with LocalCluster.start(file, port=free_ports(1)[0]) as cluster:
                    figures[name] = asyncio.run(measure(cluster.url, keys, of_part, progress, task))
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.isolation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calm-req-s", type=float, default=40.0, help="the calm tenant's arrivals")
    parser.add_argument("--measure-s", type=float, default=5.0, help="seconds of each part")
    parser.add_argument("--rounds", type=int, default=12, help="of both parts, with admission")
    parser.add_argument("--without-rounds", type=int, default=2, help="the same without admission")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=result_file, default=RESULTS / "isolation.json")
    arguments = parser.parse_args()
    plan = Plan(arguments.calm_req_s, arguments.measure_s, arguments.rounds, arguments.seed)
    figures = run(plan, arguments.without_rounds)
    ratio = figures["with_admission"]["p90_ratio"]
    setting = {"seed": plan.seed, "calm_req_s": plan.calm_req_s, "flood_streams": FLOOD_STREAMS, "admission": ADMISSION}
    write_result(arguments.out, {"p90_ratio": ratio, "allowed_ratio": ALLOWED_RATIO, **figures, "setting": setting})
    rows = []
    for name, of_part in figures.items():
        for part in ("alone", "beside_flood"):
            cells = [f"{of_part[part]['ttft_ms'][p]:.1f}" for p in ("p50", "p90", "p99")]
            rows.append((name, part, str(of_part[part]["failed"]), *cells))
    print(markdown_table(("", "calm tenant", "failed", "TTFT p50 (ms)", "p90", "p99"), rows))
    print(f"With admission the flood moves the calm tenant's p90 by {100 * (ratio - 1):+.1f} % (median of the rounds).")
    return 1 if ratio > ALLOWED_RATIO else 0


if __name__ == "__main__":
    sys.exit(main())
