"""How soon a live cluster dims when a burst comes: from the queue's signal to the launch of the first dimmed step.

demo-moe on a real Ray cluster, with an SLO as short as its steps: a few requests run at level 0, then many at once come
over HTTP, ingress and router. What happened is read from what the replicas noted, by their own clocks: when each
request came, and each level change with the time since the launch before it. The queue's signal is the first moment
after the last step that was launched at level 0, the queue being short enough then, at which a request of the burst was
there: the step after it is the first that can know. Rows with live = true in results/control.json.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks.control import save_rows
from benchmarks.loadgen.client import CompletionClient
from benchmarks.loadgen.record import RequestRecord
from benchmarks.report import Slo, measure
from benchmarks.results import RESULTS, markdown_table
from benchmarks.scenario import REPOSITORY
from benchmarks.workloads.lengths import LengthRange
from benchmarks.workloads.workload import Arrival, endless
from cluster.local.cluster import LocalCluster
from cluster.serve_file import ServeFile, load_serve_file, parse_serve_document

SERVE_FILE = REPOSITORY / "deploy/serve/demo.yaml"
SLO = Slo(ttft_s=0.2, tpot_s=0.05)  # steps of two rows take 8 ms: a queue of the burst's 60 prompts breaks it
SCENARIO_NAME = "cpu_reaction"
PROMPT_TOKENS, OUTPUT_TOKENS = LengthRange(low=16, high=32), LengthRange(low=24, high=48)
SEED = 7
NUM_QUIET, NUM_BURST = 2, 60  # requests; a replica has 32 places
QUIET_TOKENS = 200  # the quiet requests still run when the burst comes
QUIET_S = 0.5  # from the quiet requests to the burst
PAUSE_S = 4.0  # after a burst: idle time that brings every level back to 0
TIMEOUT_S = 60.0
MAX_REQUESTS = 1000

Note = Mapping[str, Any]  # of a replica: a level change or a request that ended, as the controller's client tells them


@dataclass(frozen=True, slots=True)
class Reaction:
    """The slowest replica's."""

    reaction_s: float  # from the queue's signal to the launch of the first dimmed step
    since_burst_s: float  # from the first request of the burst at that replica to the same
    step_s: float  # from the launch of the step before
    level: int  # of the first dimmed step


def reaction_of(changes: Sequence[Note], requests: Sequence[Note], burst_s: float) -> Reaction | None:
    """Of a burst sent at ``burst_s``, Unix time; None if a replica that was sent requests of it never dimmed. One that
    was dimmed already when they came had nothing to react to: 0, as in simulations."""
    came_s: dict[str, float] = {}
    for request in requests:
        at_s, replica_id = request["ended_at_s"] - request["duration_s"], request["replica_id"]
        if at_s >= burst_s:
            came_s[replica_id] = min(at_s, came_s.get(replica_id, at_s))
    reactions = []
    for replica_id, first_s in came_s.items():
        own = [change for change in changes if change["replica_id"] == replica_id]
        level = next((change["level"] for change in reversed(own) if change["at_s"] < first_s), 0)
        if level:
            reactions.append(Reaction(0.0, 0.0, 0.0, level))
            continue
        rise = next((change for change in own if change["at_s"] >= first_s), None)
        if rise is None:
            return None
        since_burst_s, step_s = rise["at_s"] - first_s, rise["since_launch_s"]
        reactions.append(Reaction(min(since_burst_s, step_s), since_burst_s, step_s, rise["level"]))
    return max(reactions, key=lambda reaction: reaction.reaction_s, default=None)


async def one_burst(client: CompletionClient, requests: Iterator[Arrival]) -> tuple[list[RequestRecord], float, float]:
    """(what became of the requests, when the burst was sent in Unix time, seconds that it all took)."""
    start_s = time.monotonic()

    def clock() -> float:
        return time.monotonic() - start_s

    def send(arrivals: Sequence[Arrival]) -> list[asyncio.Task[RequestRecord]]:
        return [asyncio.create_task(client.send(replace(a, at_s=clock()), clock)) for a in arrivals]

    tasks = send([replace(a, max_tokens=QUIET_TOKENS) for a in islice(requests, NUM_QUIET)])
    await asyncio.sleep(QUIET_S)
    burst_s = time.time()
    tasks += send(list(islice(requests, NUM_BURST)))
    return await asyncio.gather(*tasks), burst_s, clock()


def spent(cluster: LocalCluster) -> tuple[int, float]:
    """(tokens computed, their quality loss in nats) by all replicas so far."""
    reports = cluster.engine_handle().broadcast("report").results(timeout_s=TIMEOUT_S)
    totals = [report.totals for report in reports]
    return sum(t.prefill_tokens + t.decode_tokens for t in totals), sum(t.loss_nats for t in totals)


def row_of(
    seed: int,
    reaction: Reaction | None,
    num_moves: int,
    mean_loss: float,
    records: Sequence[RequestRecord],
    duration_s: float,
) -> dict[str, Any]:
    """A row of control.json."""
    metrics = asdict(measure(records, SLO, duration_s))
    return {
        "scenario": SCENARIO_NAME,
        "law": "predictive",
        "seed": seed,
        "attainment": metrics["slo_attainment"],
        "violation_s": metrics["violation_s"],
        "mean_loss": mean_loss,
        "moves_per_s": num_moves / duration_s,
        "reaction_s": reaction.reaction_s if reaction else None,
        "live": True,
        "since_burst_s": reaction.since_burst_s if reaction else None,
        "step_s": reaction.step_s if reaction else None,
        "level_first": reaction.level if reaction else 0,
        "ttft_p90_s": metrics["ttft_p90_s"],
    }


def served(num_replicas: int) -> ServeFile:
    """SERVE_FILE with this benchmark's SLO."""
    document = deepcopy(load_serve_file(SERVE_FILE).document)
    document["applications"][0]["args"] |= {"replicas": num_replicas, "slo": asdict(SLO)}
    return parse_serve_document(document)


def measure_bursts(cluster: LocalCluster, num_bursts: int) -> list[dict[str, Any]]:
    """Rows of ``num_bursts`` bursts, after one that teaches the governors this machine's steps."""
    model, controller = cluster.model_info(), cluster.controller
    start_s = time.time()
    requests = endless(PROMPT_TOKENS, OUTPUT_TOKENS, model.vocab_size, SEED)

    async def burst() -> tuple[list[RequestRecord], float, float]:
        async with CompletionClient(cluster.url, model.name, TIMEOUT_S) as client:
            return await one_burst(client, requests)

    rows = []
    for seed in track(range(num_bursts + 1), description=f"bursts of {NUM_BURST} requests"):
        tokens_before, nats_before = spent(cluster)
        records, burst_s, duration_s = asyncio.run(burst())
        tokens, nats = spent(cluster)
        until_s = time.time()
        changes = controller.level_changes(start_s, until_s)
        reaction = reaction_of(changes, controller.requests_between(burst_s, until_s, MAX_REQUESTS), burst_s)
        if seed:
            num_moves = sum(change["at_s"] >= until_s - duration_s for change in changes)
            mean_loss = (nats - nats_before) / max(tokens - tokens_before, 1)
            rows.append(row_of(seed, reaction, num_moves, mean_loss, records, duration_s))
        time.sleep(PAUSE_S)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reaction", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bursts", type=int, default=5)
    parser.add_argument("--replicas", type=int, default=1, help="each computes on one core")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of control.json")
    arguments = parser.parse_args(argv)
    console = Console()
    with console.status("starting the cluster (half a minute)"):
        cluster = LocalCluster.start(served(arguments.replicas))
    with cluster:
        rows = measure_bursts(cluster, arguments.bursts)
    save_rows(arguments.out / "control.json", SCENARIO_NAME, rows, live=True)
    keys = ("reaction_s", "step_s", "since_burst_s", "level_first", "attainment", "ttft_p90_s")
    cells = [(str(row["seed"]), *("-" if row[key] is None else f"{row[key]:.3g}" for key in keys)) for row in rows]
    console.print(markdown_table(("burst", *keys), cells), markup=False, highlight=False)
    return 0 if all(row["reaction_s"] is not None for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
