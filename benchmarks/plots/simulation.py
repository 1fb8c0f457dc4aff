"""The picture of a simulation: p90 TTFT against its objective above, brownout level below, one line per law."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.simulator.runs import Run
from benchmarks.simulator.scenario import ScenarioFile

COLORS = {"none": "0.55", "aimd": "#d1495b", "pi": "#e0a030", "predictive": "#2e6f95", "strongest": "#8a6fb0"}
NUM_LEVEL_SAMPLES = 600


def draw_runs(runs: Sequence[Run], scenario: ScenarioFile, path: Path) -> None:
    """Writes the picture of runs of one seed to ``path``."""
    figure, (latency, level) = plt.subplots(
        2, 1, sharex=True, figsize=(9, 6), height_ratios=(2, 1), layout="constrained"
    )
    for run in runs:
        color = COLORS.get(run.row.law)
        label = f"{run.row.law}: {run.row.attainment:.1%} in time, loss {run.row.mean_loss:.3f}"
        seconds = run.seconds
        latency.plot(
            [s.second + 0.5 for s in seconds], [s.ttft_p90_s for s in seconds], color=color, lw=1.5, label=label
        )
        times_s = np.linspace(0, run.outcome.end_s, NUM_LEVEL_SAMPLES)
        level.plot(times_s, _mean_level(run, times_s), color=color, lw=1.4)
    latency.axhline(scenario.slo.ttft_s, color="0.2", ls="--", lw=1.2, label=f"SLO {scenario.slo.ttft_s:g} s")
    latency.set_yscale("log")
    latency.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    latency.set_ylabel("TTFT (s), p90 of each second's arrivals")
    latency.grid(axis="y", color="0.9", lw=0.8)
    latency.legend(frameon=False, fontsize=8)
    level.set_ylabel("mean brownout level")
    level.set_ylim(-0.3, len(scenario.plant.levels) - 0.7)
    level.set_xlabel("virtual time (s)")
    for axes in (latency, level):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{scenario.name} (simulated): {scenario.description}", fontsize=10, wrap=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _mean_level(run: Run, times_s: np.ndarray) -> np.ndarray:
    """Over the replicas, at each of ``times_s`` [n] -> [n]."""
    levels = []
    for log in run.outcome.logs:
        at_s = [at for at, _ in log.levels]
        values = np.array([0, *(level for _, level in log.levels)])
        levels.append(values[np.searchsorted(at_s, times_s, side="right")])
    return np.mean(levels, axis=0)
