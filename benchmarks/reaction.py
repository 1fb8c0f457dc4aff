"""How soon a live engine dims when a burst comes: from its first request to the launch of the first dimmed step.

An engine of deploy/serve/two-models.yaml in a thread of its own, as in a replica, on the wall clock: a few requests
run at level 0, then many arrive at once. Their queue breaks the promise, and the governor sees it before the next step,
so the delay is what is left of the step under way. Both are measured for each burst, and saved as live rows of
results/control.json.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.control import save_rows
from benchmarks.loadgen.in_process import EngineClient
from benchmarks.loadgen.record import RequestRecord
from benchmarks.report import Slo, measure
from benchmarks.results import RESULTS, markdown_table
from benchmarks.simulator.validate import SERVE_FILE
from benchmarks.workloads.lengths import LengthRange
from benchmarks.workloads.workload import Arrival, endless
from cluster.serve_file import load_serve_file
from controller.laws.predictive import PredictiveParams
from engine.async_engine import AsyncEngine
from engine.brownout import Brownout
from engine.scheduler.scheduler import ScheduledBatch, Scheduler
from engine.types import BrownoutSetting, Levels, PhaseSetting

SCENARIO_NAME = "cpu_reaction"
PROMPT_TOKENS, OUTPUT_TOKENS = LengthRange(low=16, high=32), LengthRange(low=24, high=48)
SEED = 7
NUM_QUIET, NUM_BURST = 2, 60  # requests; 32 places
QUIET_S = 0.3  # from the quiet requests to the burst


@dataclass(frozen=True, slots=True)
class Reaction:
    """What one burst met. Seconds since the burst's first request."""

    first_dimmed_s: float | None  # launch of the first dimmed step; None: there was none
    num_undimmed: int  # steps at level 0 launched before it
    step_s: float  # length of the step that was under way
    level: int  # of the first dimmed step
    records: tuple[RequestRecord, ...]
    moves: int
    duration_s: float


def watch(brownout: Brownout) -> list[tuple[float, int]]:
    """From now on each step's (launch, level) is noted."""
    steps: list[tuple[float, int]] = []
    choose = brownout.choose

    def watched(scheduler: Scheduler, batch: ScheduledBatch, now_s: float) -> Levels:
        levels = choose(scheduler, batch, now_s)
        steps.append((now_s, levels.peak))
        return levels

    brownout.choose = watched  # type: ignore[method-assign]
    return steps


async def one_burst(engine: AsyncEngine, steps: list[tuple[float, int]], requests: Iterator[Arrival]) -> Reaction:
    client, start_s = EngineClient(engine), time.monotonic()

    def send(count: int) -> list[asyncio.Task[RequestRecord]]:
        at_s = time.monotonic() - start_s
        arrivals = (Arrival(at_s, r.prompt_ids, r.max_tokens, r.seed) for r in islice(requests, count))
        return [asyncio.create_task(client.send(a, lambda: time.monotonic() - start_s)) for a in arrivals]

    steps.clear()
    tasks = send(NUM_QUIET)
    await asyncio.sleep(QUIET_S)
    while not steps:  # on a machine that is busy
        await asyncio.sleep(0.001)
    burst_s = time.monotonic()
    tasks += send(NUM_BURST)
    records = await asyncio.gather(*tasks)
    after = [(at_s, level) for at_s, level in steps if at_s >= burst_s]
    under_way_s = max(at_s for at_s, _ in steps if at_s < burst_s)
    dimmed = next(((at_s, level) for at_s, level in after if level), None)
    return Reaction(
        first_dimmed_s=dimmed[0] - burst_s if dimmed else None,
        num_undimmed=sum(1 for at_s, _ in after if dimmed is None or at_s < dimmed[0]),
        step_s=after[0][0] - under_way_s,
        level=dimmed[1] if dimmed else 0,
        records=tuple(records),
        moves=sum(one != other for (_, one), (_, other) in pairwise(steps)),
        duration_s=time.monotonic() - start_s,
    )


async def measure_bursts(num_bursts: int) -> tuple[list[Reaction], Slo]:
    config = load_serve_file(SERVE_FILE).config.engine_config()
    engine = await AsyncEngine.start(config)
    margins, top = PredictiveParams(), engine.info.num_levels - 1
    engine.apply_setting(
        BrownoutSetting(
            prefill=PhaseSetting(0, top, config.slo.ttft_s, margins.ttft_margin),
            decode=PhaseSetting(0, top, config.slo.tpot_s, margins.tpot_margin),
            law="predictive",
        )
    )
    try:
        requests = endless(PROMPT_TOKENS, OUTPUT_TOKENS, engine.info.vocab_size, SEED)
        steps = watch(engine.brownout)
        await one_burst(engine, steps, requests)  # it teaches the governor this machine's steps
        reactions = [await one_burst(engine, steps, requests) for _ in range(num_bursts)]
        return reactions, Slo(config.slo.ttft_s, config.slo.tpot_s)
    finally:
        await engine.stop()


def row_of(seed: int, reaction: Reaction, slo: Slo) -> dict[str, Any]:
    """A row of control.json; ``reaction_steps`` counts undimmed steps launched after the burst's first request."""
    metrics = asdict(measure(reaction.records, slo, reaction.duration_s))
    return {
        "scenario": SCENARIO_NAME,
        "law": "predictive",
        "seed": seed,
        "attainment": metrics["slo_attainment"],
        "violation_s": metrics["violation_s"],
        "mean_loss": 0.0,  # random weights have none
        "moves_per_s": reaction.moves / reaction.duration_s,
        "reaction_s": reaction.first_dimmed_s,
        "live": True,
        "reaction_steps": reaction.num_undimmed,
        "step_s": reaction.step_s,
        "level_first": reaction.level,
        "ttft_p90_s": metrics["ttft_p90_s"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reaction", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--bursts", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of control.json")
    arguments = parser.parse_args(argv)
    console = Console()
    with console.status(f"{arguments.bursts} bursts of {NUM_BURST} requests (half a minute)"):
        reactions, slo = asyncio.run(measure_bursts(arguments.bursts))
    rows = [row_of(seed, reaction, slo) for seed, reaction in enumerate(reactions, 1)]
    save_rows(arguments.out / "control.json", SCENARIO_NAME, rows, live=True)
    keys = ("reaction_s", "step_s", "reaction_steps", "level_first", "attainment", "ttft_p90_s")
    console.print(
        markdown_table(("burst", *keys), [(str(row["seed"]), *(f"{row[key]:.3g}" for key in keys)) for row in rows]),
        markup=False,
        highlight=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
