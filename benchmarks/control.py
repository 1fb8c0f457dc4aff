"""The control bars: every scenario under the laws that it compares, saved as results/control.json.

Rows of the scenarios that are run replace those of earlier runs; all others stay, so parts can be run on their own:

  python -m benchmarks.control burst_1.6x wrong_profile_0.8 --seeds 5

Seeds draw arrivals and lengths anew; where a recorded trace gives both, they only break the router's ties.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from benchmarks.plots.simulation import draw_runs
from benchmarks.results import RESULTS, markdown_table, write_result
from benchmarks.simulator.__main__ import simulate
from benchmarks.simulator.least_loss import least_loss
from benchmarks.simulator.runs import means, measure_capacity
from benchmarks.simulator.scenario import ScenarioFile, load_scenario
from benchmarks.simulator.traffic import build_traffic

FULL = ("none", "aimd", "pi", "predictive", "strongest")
PLAN = {
    "burst_1.6x": FULL,
    "wrong_profile_0.8": ("predictive",),
    "wrong_profile_1.25": ("predictive",),
    "wrong_plant": ("none", "pi", "predictive", "strongest"),
    "conv_ramp": ("none", "aimd", "predictive"),
    "code_burst": FULL,
    "code_burst_chunks": ("none", "predictive", "strongest"),
    "code_burst_order": ("none", "predictive", "strongest"),
    "code_burst_shed": ("none", "predictive", "strongest"),
    "code_burst_all": ("none", "predictive", "strongest"),
    "steady": ("predictive",),
    "slow_replica": ("predictive",),
}
BOUNDED = ("burst_1.6x",)  # scenarios whose least possible loss is computed too, as law "least_loss"
PICTURES = ("burst_1.6x", "conv_ramp", "code_burst_all", "wrong_plant")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.control", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenarios", nargs="*", help=f"default: all of {', '.join(PLAN)}", metavar="SCENARIO")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.scenarios) - set(PLAN))
    if unknown:
        parser.error(f"unknown scenarios {', '.join(unknown)}; there are {', '.join(PLAN)}")
    console = Console()
    path = arguments.out / "control.json"
    for name in arguments.scenarios or PLAN:
        scenario = load_scenario(name)
        runs = simulate(scenario, PLAN[name], range(1, arguments.seeds + 1), console)
        rows = [asdict(run.row) for run in runs]
        if name in BOUNDED:
            bounds = least_loss_rows(scenario, arguments.seeds)
            console.print(f"least loss, all arrivals known: {mean(row['mean_loss'] for row in bounds):.4f}")
            rows += bounds
        save_rows(path, name, rows)
        if name in PICTURES:
            draw_runs([run for run in runs if run.row.seed == 1], scenario, arguments.out / f"control_{name}.png")
        console.print(_table([run.row for run in runs]), markup=False, highlight=False)
    return 0


def least_loss_rows(scenario: ScenarioFile, num_seeds: int) -> list[dict[str, Any]]:
    """What a law that knew all arrivals would spend on them, by seed."""
    capacity_req_s = measure_capacity(scenario)
    same = {"scenario": scenario.name, "law": "least_loss", "attainment": 1.0, "violation_s": 0, "live": False}
    return [
        {**same, "seed": seed, "mean_loss": least_loss(scenario, build_traffic(scenario, capacity_req_s, seed))}
        for seed in range(1, num_seeds + 1)
    ]


def save_rows(path: Path, scenario: str, rows: list[dict[str, Any]], live: bool = False) -> None:
    """Put ``rows`` in the place of the scenario's earlier ones."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in old if (row["scenario"], row["live"]) != (scenario, live)]
    order = list(PLAN)
    ordered = sorted([*kept, *rows], key=lambda row: (row["live"], _place(order, row["scenario"])))
    write_result(path, {"rows": ordered})


def _place(order: list[str], name: str) -> int:
    return order.index(name) if name in order else len(order)


def _table(rows: list[Any]) -> str:
    by_law: dict[str, list[Any]] = {}
    for row in rows:
        by_law.setdefault(row.law, []).append(row)
    keys = ("attainment", "violation_s", "violations", "mean_loss", "moves_per_s", "reaction_s", "settle_s")
    cells = []
    for law, members in by_law.items():
        average = means(members)
        cells.append((law, *("-" if average.get(key) is None else f"{average[key]:.4g}" for key in keys)))
    return markdown_table((rows[0].scenario, *keys), cells)


if __name__ == "__main__":
    sys.exit(main())
