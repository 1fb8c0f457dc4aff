"""Simulate a scenario: the live scheduler, governor, laws, guard, router policy on a virtual clock.

Examples:

  python -m benchmarks.simulator burst_1.6x
      one burst under every law, five seeds, table and plot

  python -m benchmarks.simulator burst_1.6x --law predictive --law pi --seeds 1 --out /tmp/sim
      two laws, one seed; rows.json and a plot in /tmp/sim

  python -m benchmarks.simulator my_scenario.yaml --law static:2 --set profile_error=0.8
      a file of yours, level 2 pinned, with a profile that is 20 % too fast

A scenario says what the replicas are made of (a measured profile from benchmarks/results), how many there are, what is
promised and what arrives. Those that come with the repository lie in benchmarks/scenarios/simulator.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks import environment
from benchmarks.simulator.runs import NAMED_LAWS, Run, means, measure_capacity, run_once
from benchmarks.simulator.scenario import SCENARIOS, ScenarioFile, SimulationError, load_scenario
from benchmarks.simulator.traffic import build_traffic
from engine.config import ConfigError

DEFAULT_LAWS = ("none", "aimd", "pi", "predictive", "strongest")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    console = Console()
    try:
        scenario = load_scenario(arguments.scenario, dict(_override(text) for text in arguments.set))
        laws = arguments.law or list(DEFAULT_LAWS)
        runs = simulate(scenario, laws, range(1, arguments.seeds + 1), console)
    except (SimulationError, ConfigError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 2
    console.print(_table(runs, scenario))
    if arguments.out is not None:
        _write(arguments.out, runs, scenario)
        console.print(f"wrote {arguments.out / 'rows.json'} and {arguments.out / (scenario.name + '.png')}")
    return 0


def simulate(scenario: ScenarioFile, laws: Sequence[str], seeds: Sequence[int], console: Console) -> list[Run]:
    """Every law on every seed's arrivals."""
    started_s = time.perf_counter()
    with console.status("measuring capacity at level 0"):
        capacity_req_s = measure_capacity(scenario)
    if capacity_req_s:
        console.print(f"{scenario.name}: the fleet carries {capacity_req_s:.1f} requests/s at level 0")
    columns = (
        TextColumn("{task.description:24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("requests"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    runs = []
    with Progress(*columns, console=console, transient=True) as progress:
        sizes = {seed: len(build_traffic(scenario, capacity_req_s, seed).requests) for seed in seeds}
        task = progress.add_task("", total=len(laws) * sum(sizes.values()))
        for law in laws:
            for seed in seeds:
                progress.update(task, description=f"{law}, seed {seed}")
                runs.append(run_once(scenario, law, seed, capacity_req_s, lambda n: progress.advance(task, n)))
    console.print(f"{len(runs)} runs in {time.perf_counter() - started_s:.1f} s")
    return runs


def _parser() -> argparse.ArgumentParser:
    summary, _, epilog = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulator",
        description=summary,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join(sorted(path.stem for path in SCENARIOS.glob("*.yaml") if not path.stem.startswith("_")))
    parser.add_argument("scenario", help=f"a file, or one of: {known}")
    parser.add_argument(
        "--law",
        action="append",
        help=f"{', '.join(NAMED_LAWS)} or static:LEVEL; may be repeated (default: {', '.join(DEFAULT_LAWS)}). "
        "none and strongest pin the two ends of the ladder",
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many draws of the arrivals (default: 5)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, as plant.kv_error=2")
    parser.add_argument("--out", type=Path, help="folder for rows.json and the plot")
    return parser


def _override(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise SimulationError(f"--set is {text!r}; allowed: KEY=VALUE")
    return key, yaml.safe_load(value)


def _table(runs: list[Run], scenario: ScenarioFile) -> Table:
    table = Table(title=f"{scenario.name}: TTFT {scenario.slo.ttft_s:g} s, mean TPOT {scenario.slo.tpot_s * 1e3:g} ms")
    header = (
        "law",
        "attainment",
        "violation s",
        "mean loss",
        "moves/s",
        "reaction s",
        "TTFT p90 s",
        "TPOT p90 ms",
        "settle s",
    )
    for name in header:
        table.add_column(name, justify="left" if name == "law" else "right")
    by_law: dict[str, list[Run]] = {}
    for run in runs:
        by_law.setdefault(run.row.law, []).append(run)
    for law, members in by_law.items():
        mean = means([run.row for run in members])
        table.add_row(
            law,
            f"{mean['attainment']:.2%}",
            f"{mean['violation_s']:.1f}",
            f"{mean['mean_loss']:.4f}",
            f"{mean['moves_per_s']:.2f}",
            *(_number(mean.get(key), scale) for key, scale in _LATENCIES),
        )
    return table


_LATENCIES = (("reaction_s", 1.0), ("ttft_p90_s", 1.0), ("tpot_p90_s", 1e3), ("settle_s", 1.0))


def _number(value: float | None, scale: float) -> str:
    return "-" if value is None else f"{value * scale:.3f}"


def _write(out: Path, runs: list[Run], scenario: ScenarioFile) -> None:
    from benchmarks.plots.simulation import draw_runs

    out.mkdir(parents=True, exist_ok=True)
    document = {"scenario": scenario.model_dump(), "rows": [asdict(run.row) for run in runs], **environment.describe()}
    (out / "rows.json").write_text(json.dumps(document, indent=1) + "\n")
    draw_runs([run for run in runs if run.row.seed == runs[0].row.seed], scenario, out / f"{scenario.name}.png")


if __name__ == "__main__":
    sys.exit(main())
