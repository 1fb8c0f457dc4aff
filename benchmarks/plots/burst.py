"""The picture of a burst: p90 TTFT against its objective above, brownout level below, one line per run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.report import SecondStats, Slo


@dataclass(frozen=True, slots=True)
class LevelSample:
    """Mean decode level over the replicas at a moment of the run."""

    at_s: float
    level: float


@dataclass(frozen=True, slots=True)
class RunCurve:
    """What the picture shows of one run."""

    label: str
    seconds: Sequence[SecondStats]
    levels: Sequence[LevelSample]
    color: str | None = None  # None: as matplotlib likes


def draw_burst(
    curves: Sequence[RunCurve],
    slo: Slo,
    num_levels: int,
    title: str,
    path: Path,
    burst_s: tuple[float, float] | None = None,
) -> None:
    """Writes the picture to ``path``; ``burst_s``, the burst's (start, end) in seconds, is shaded."""
    figure, (latency, level) = plt.subplots(
        2, 1, sharex=True, figsize=(9, 6), height_ratios=(2, 1), layout="constrained"
    )
    _draw_latency(latency, curves, slo)
    for axes in (latency, level):
        axes.spines[["top", "right"]].set_visible(False)
        if burst_s is not None:
            axes.axvspan(*burst_s, color="0.92", zorder=0)
    if burst_s is not None:
        middle = (sum(burst_s) / 2, 0.03)
        latency.annotate("burst", middle, xycoords=("data", "axes fraction"), ha="center", va="bottom", color="0.4")
    for curve in curves:
        level.plot([s.at_s for s in curve.levels], [s.level for s in curve.levels], color=curve.color, lw=1.6)
    level.set_ylabel("mean brownout level")
    level.set_ylim(-0.3, max(1, num_levels - 1) + 0.3)
    level.set_xlabel("time since the run's start (s)")
    figure.suptitle(title, fontsize=11, wrap=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_latency(axes: Axes, curves: Sequence[RunCurve], slo: Slo) -> None:
    for curve in curves:
        axes.plot(
            [s.second + 0.5 for s in curve.seconds],
            [s.ttft_p90_s for s in curve.seconds],
            color=curve.color,
            label=curve.label,
            lw=1.6,
            marker=".",
            ms=5,
        )
    axes.axhline(slo.ttft_s, color="0.2", ls="--", lw=1.2, label=f"SLO {slo.ttft_s:g} s")
    axes.set_yscale("log")
    axes.margins(y=0.12)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylabel("TTFT (s), p90 of each second's arrivals")
    axes.grid(axis="y", color="0.9", lw=0.8)
    axes.legend(frameon=False, fontsize="small", loc="upper left")
