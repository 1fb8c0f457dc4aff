"""One of four replicas at 0.6 of the speed: the router's policy against shortest queue, and against what is possible.

Simulated with the live policy, scheduler, governor and law (`benchmarks.simulator`, scenario slow_replica) at several
loads, 1.0 being what level 0 carries on all four. Under the promised time per token level 0 carries less than that, so
some loss is unavoidable: how much is looked for among fixed shares of the requests for the slow replica, the others
sharing the rest by their queues. It is an estimate of the least, not a bound: a policy sees more than a share does.
Saved in results/serving.json as "slow_replica"; loads may be run one at a time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks.results import RESULTS, markdown_table, result_file, update_result
from benchmarks.simulator.runs import means, measure_capacity, run_once
from benchmarks.simulator.scenario import load_scenario

SCENARIO = "slow_replica"
LAW = "predictive"
LOADS = (0.6, 0.7, 0.8, 0.9, 1.0, 1.05)
SHARES = (0.02, 0.04, 0.08, 0.12, 0.16)  # of all requests, for the slow replica; an even share is 0.25
SPLIT_SEEDS = 2  # draws of the arrivals for each share: their losses lie within a tenth of each other
FIGURES = ("mean_loss", "attainment", "violations", "requests", "ttft_p90_s", "tpot_p90_s")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.slow_replica",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS, help=f"default: {LOADS}")
    parser.add_argument("--duration", type=float, default=60.0, help="simulated seconds of each run")
    parser.add_argument("--seeds", type=int, default=5, help="draws of the arrivals for the two policies (default: 5)")
    parser.add_argument("--out", type=result_file, default=RESULTS / "serving.json")
    arguments = parser.parse_args(argv)
    console = Console(stderr=True)
    capacity_req_s = measure_capacity(load_scenario(SCENARIO))
    console.print(f"the four replicas carry {capacity_req_s:.1f} requests/s at level 0")

    def figures(load: float, num_seeds: int, **fleet: Any) -> dict[str, float]:
        phases = [{"name": "load", "duration_s": arguments.duration, "load": load}]
        scenario = load_scenario(SCENARIO, {"fleet": fleet, "traffic.phases": phases})
        rows = [run_once(scenario, LAW, seed, capacity_req_s).row for seed in range(1, num_seeds + 1)]
        mean = means(rows)
        return {key: mean[key] for key in FIGURES}

    by_load = {}
    for load in track(arguments.loads, "loads", console=console):
        seeds = arguments.seeds
        splits = {share: figures(load, min(SPLIT_SEEDS, seeds), routing="split", first_share=share) for share in SHARES}
        best_share = min(splits, key=lambda share: splits[share]["mean_loss"])
        by_load[f"{load:g}"] = {
            "policy": figures(load, seeds, routing="load"),
            "shortest_queue": figures(load, seeds, routing="shortest_queue"),
            "best_split": {"share": best_share, **splits[best_share]},
        }
    update_result(
        arguments.out,
        {
            "slow_replica": {
                "seeds": arguments.seeds,
                "split_seeds": SPLIT_SEEDS,
                "duration_s": arguments.duration,
                "capacity_req_s": capacity_req_s,
                "by_load": by_load,
            }
        },
    )
    print(_table(by_load))
    return 0


def _table(by_load: dict[str, dict[str, dict[str, float]]]) -> str:
    header = ("load", "shortest queue: loss", "policy: loss", "of it", "best fixed share: loss", "of it", "attainment")
    rows = []
    for load, of_load in by_load.items():
        queue, policy, split = (of_load[name] for name in ("shortest_queue", "policy", "best_split"))
        rows.append(
            (
                load,
                f"{queue['mean_loss']:.4f}",
                f"{policy['mean_loss']:.4f}",
                f"{policy['mean_loss'] / queue['mean_loss']:.0%}" if queue["mean_loss"] else "-",
                f"{split['mean_loss']:.4f} ({split['share']:.0%} to the slow one)",
                f"{split['mean_loss'] / queue['mean_loss']:.0%}" if queue["mean_loss"] else "-",
                f"{queue['attainment']:.2%} / {policy['attainment']:.2%} / {split['attainment']:.2%}",
            )
        )
    return markdown_table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
