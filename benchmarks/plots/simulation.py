"""The picture of a simulation: one line per law, drawn as a burst is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.plots.burst import LevelSample, RunCurve, draw_burst
from benchmarks.report import Slo
from benchmarks.simulator.runs import Run
from benchmarks.simulator.scenario import ScenarioFile

COLORS = {"none": "0.55", "aimd": "#d1495b", "pi": "#e0a030", "predictive": "#2e6f95", "strongest": "#8a6fb0"}
NUM_LEVEL_SAMPLES = 600


def draw_runs(runs: Sequence[Run], scenario: ScenarioFile, path: Path) -> None:
    """Writes the picture of runs of one seed to ``path``."""
    curves = []
    for run in runs:
        label = f"{run.row.law}: {run.row.attainment:.1%} in time, loss {run.row.mean_loss:.3f}"
        times_s = np.linspace(0, run.outcome.end_s, NUM_LEVEL_SAMPLES)
        levels = [LevelSample(*sample) for sample in zip(times_s, _mean_level(run, times_s), strict=True)]
        curves.append(RunCurve(label, run.seconds, levels, COLORS.get(run.row.law)))
    title = f"{scenario.name} (simulated): {scenario.description}"
    draw_burst(curves, Slo(scenario.slo.ttft_s, scenario.slo.tpot_s), len(scenario.plant.levels), title, path)


def _mean_level(run: Run, times_s: np.ndarray) -> np.ndarray:
    """Over the replicas, at each of ``times_s`` [n] -> [n]."""
    levels = []
    for log in run.outcome.logs:
        at_s = [at for at, _ in log.levels]
        values = np.array([0, *(level for _, level in log.levels)])
        levels.append(values[np.searchsorted(at_s, times_s, side="right")])
    return np.mean(levels, axis=0)
