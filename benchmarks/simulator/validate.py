"""Is the simulator right? The same arrivals through a live CPU engine and through the simulator.

The engine runs in this process with the demo's configuration. The steps of a first live run, in which the levels take
turns, fit the plant; a second live run, of another seed, is compared with the simulator. One setting governs both,
without a controller, and both governors begin with the plant's step times, so that nothing but the steps differs. The
live engine runs on the CPU time of this process and skips what would be idle: neighbours on the machine take its time
away, but none of its work. Set OMP_NUM_THREADS=1, or CPU time counts every thread.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks.control import save_rows
from benchmarks.loadgen.record import RequestRecord
from benchmarks.report import Slo, measure, percentile
from benchmarks.results import RESULTS, markdown_table, write_result
from benchmarks.scenario import REPOSITORY
from benchmarks.simulator.cluster import SimulatedCluster
from benchmarks.simulator.live import MARGINS, CpuClock, CpuTimedBrownout, LiveRun, run_live
from benchmarks.simulator.runs import policy_of
from benchmarks.simulator.scenario import ScenarioFile, SimulationError
from benchmarks.simulator.traffic import build_traffic
from cluster.serve_file import load_serve_file
from engine.config import EngineConfig
from engine.engine import Engine
from engine.step_time import StepTimeModel

SERVE_FILE = REPOSITORY / "deploy/serve/two-models.yaml"
MIN_STEPS = 20  # that a level must have run before its times are its own
KNEE = 16  # tokens of a step
TOKEN_COUNTS = (1, KNEE, 4 * KNEE)


def fitted(num_levels: int, steps: Sequence[tuple[int, int, float]]) -> StepTimeModel:
    """Step times by level from the steps of a run: least squares, piecewise linear in the tokens with a knee at KNEE.

    The knee is where most experts are active. A level that hardly ran takes after the next shallower one.
    """
    rows: list[list[float]] = []
    for level in range(num_levels):
        at_level = np.array([(n, s) for of, n, s in steps if of == level]).reshape(-1, 2)
        if len(at_level) >= MIN_STEPS:
            tokens, times_s = at_level.T
            terms = np.column_stack([np.ones_like(tokens), np.minimum(tokens, KNEE), np.maximum(tokens - KNEE, 0)])
            weights, *_ = np.linalg.lstsq(terms, times_s, rcond=None)
            counts = np.array(TOKEN_COUNTS)
            grid = np.column_stack([np.ones_like(counts), np.minimum(counts, KNEE), np.maximum(counts - KNEE, 0)])
            rows.append(np.maximum(grid @ weights, times_s.min()).tolist())
        elif rows:
            rows.append(rows[-1])
        else:
            raise SimulationError(f"level 0 ran {len(at_level)} steps, too few to fit; allowed: {MIN_STEPS} or more")
    return StepTimeModel.fit(TOKEN_COUNTS, rows)


def scenario_of(config: EngineConfig, model: StepTimeModel, loss: Sequence[float], folder: Path) -> ScenarioFile:
    """The simulated twin of an engine: its limits, its promise, its own profile as the plant."""
    profile = folder / "profile.json"  # read again by the plant
    times_s = [list(row) for row in model.times_s]
    write_result(profile, {"profile": {"token_counts": list(model.token_counts), "times_s": times_s}})
    names = [f"level {i}" for i in range(model.num_levels)]
    levels = [{"name": name, "profile": "", "loss": lost} for name, lost in zip(names, loss, strict=True)]
    scheduler, cache = config.scheduler, config.cache
    return ScenarioFile.model_validate(
        {
            "name": "cpu_burst",
            "description": "One CPU engine: quiet, burst, quiet.",
            "slo": {"ttft_s": config.slo.ttft_s, "tpot_s": config.slo.tpot_s},
            "plant": {"profile": str(profile), "levels": levels, "united_fade": {1: 1.0, 2: 1.0}},
            "engine": {
                "max_num_seqs": scheduler.max_num_seqs,
                "max_num_batched_tokens": scheduler.max_num_batched_tokens,
                "num_blocks": cache.num_blocks or 2048,
            },
            "traffic": {
                "phases": [
                    {"name": "quiet", "duration_s": 10, "load": 0.5},
                    {"name": "burst", "duration_s": 15, "load": 1.6},
                    {"name": "quiet", "duration_s": 10, "load": 0.5},
                ],
                "prompt_quantiles": [16, 32],
                "output_quantiles": [24, 48],
            },
            "network_delay_s": 0.0,
            "law_params": {"predictive": MARGINS},
        }
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulator.validate", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--load-req-s", type=float, default=10.0, help="what counts as load 1 (default: 10 requests/s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for sim_validation.json")
    arguments = parser.parse_args(argv)
    console = Console()
    config = load_serve_file(SERVE_FILE).config.engine_config()
    with console.status("starting the engine and profiling its steps"):
        clock = CpuClock()
        engine = Engine(config, clock)
    profile = engine.brownout.governor.model
    engine.brownout = CpuTimedBrownout(profile, config, may_dim=True)
    loss = engine.info.level_loss or (0.0,) * engine.info.num_levels
    seed = arguments.seed
    with TemporaryDirectory() as folder, Progress(console=console, transient=True) as progress:
        scenario = scenario_of(config, profile, loss, Path(folder))
        first = build_traffic(scenario, arguments.load_req_s, seed + 1)
        plant = fitted(engine.info.num_levels, run_live(engine, clock, first, loss, seed + 1, progress, True).steps)
        scenario = scenario_of(config, plant, loss, Path(folder))
        engine.brownout = CpuTimedBrownout(plant, config, may_dim=True)  # knows as much as the simulated one will
        traffic = build_traffic(scenario, arguments.load_req_s, seed)
        live = run_live(engine, clock, traffic, loss, seed, progress)
    # Once more with a plant of the compared run's own steps: what is left then is no drift of the machine.
    plants = {"simulated": plant, "simulated, own steps": fitted(engine.info.num_levels, live.steps)}
    slo = Slo(config.slo.ttft_s, config.slo.tpot_s)
    figures = {"live": figures_of(live.records, slo, traffic.duration_s, live.levels, live.reaction_s)}
    for name, model in plants.items():
        with TemporaryDirectory() as folder:
            twin = scenario_of(config, model, loss, Path(folder))
            log = SimulatedCluster(twin, policy_of("predictive", twin), seed, plant).run(traffic).logs[0]
        figures[name] = figures_of(log.records, slo, traffic.duration_s, log.levels, log.reaction_s)
        figures[name]["ttft_p90_difference"] = figures[name]["ttft_p90_s"] / figures["live"]["ttft_p90_s"] - 1
    write_result(
        arguments.out / "sim_validation.json",
        {
            "seed": seed,
            "load_req_s": arguments.load_req_s,
            "requests": len(traffic.requests),
            "plant": {"token_counts": plant.token_counts, "times_s": plant.times_s},
            "runs": figures,
            "live_step_p90_s": percentile([step_s for _, _, step_s in live.steps], 90),
        },
    )
    keys = list(figures["live"])
    rows = [(name, *(_text(values[key]) for key in keys)) for name, values in figures.items()]
    save_rows(arguments.out / "control.json", "cpu_burst", [_row(scenario, seed, figures["live"], live)], live=True)
    print(markdown_table(("", *keys), rows))
    for name in list(figures)[1:]:
        print(f"TTFT p90, {name}: {figures[name]['ttft_p90_difference']:+.1%}, {len(traffic.requests)} requests")
    return 0


def _row(scenario: ScenarioFile, seed: int, figures: dict[str, Any], live: LiveRun) -> dict[str, Any]:
    """The live run as a row of control.json."""
    num_tokens = sum(n for _, n, _ in live.steps)
    return {
        "scenario": scenario.name,
        "law": "predictive",
        "seed": seed,
        "attainment": figures["slo_attainment"],
        "violation_s": figures["violation_s"],
        "mean_loss": live.loss_nats / num_tokens,
        "moves_per_s": figures["moves_per_s"],
        "reaction_s": figures["reaction_s"],
        "live": True,
        "ttft_p90_s": figures["ttft_p90_s"],
        "level_peak": figures["level_peak"],
    }


def figures_of(
    records: Sequence[RequestRecord],
    slo: Slo,
    offered_s: float,
    levels: Sequence[tuple[float, int]],
    reaction_s: float | None,
) -> dict[str, Any]:
    metrics = asdict(measure(records, slo, offered_s))
    names = ("slo_attainment", "violation_s", "ttft_p50_s", "ttft_p90_s", "tpot_p50_s", "tpot_p90_s")
    return {
        **{name: metrics[name] for name in names},
        "level_peak": max(level for _, level in levels),
        "moves_per_s": (len(levels) - 1) / metrics["duration_s"],
        "reaction_s": reaction_s,
    }


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
