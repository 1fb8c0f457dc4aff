"""The Pareto front as a picture: quality loss against step time, one panel for each step size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.calibrate.candidates import StepSize
from engine.calibrate.profile import QualityProfile
from engine.moe.ladder import Bucket
from engine.moe.settings import DimmerKind

COLORS = {
    DimmerKind.UNITED: "tab:blue",
    DimmerKind.PAPER: "tab:gray",
    DimmerKind.PIGGYBACK: "tab:orange",
    DimmerKind.SIMILAR: "tab:olive",
    DimmerKind.TOPK: "tab:green",
}


def plot_fronts(profile: QualityProfile, sizes: Sequence[StepSize], buckets: Sequence[Bucket], path: Path) -> None:
    """Raises ImportError without matplotlib (the extra "bench")."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(sizes), 3.6), layout="constrained")
    axes = figure.subplots(1, len(sizes), squeeze=False)[0]
    for ax, size, bucket in zip(axes, sizes, buckets, strict=True):
        rows = [row for row in profile.of(size).values() if row.step_frac is not None]
        for kind in dict.fromkeys(row.setting.kind for row in rows):
            of_kind = [row for row in rows if row.setting.kind is kind]
            ax.errorbar(
                [row.step_frac for row in of_kind], [max(row.loss, 0.0) for row in of_kind],
                yerr=[row.se for row in of_kind], fmt="o", ms=4, lw=0.8, color=COLORS[kind], label=kind.name.lower(),
            )  # fmt: skip
        ax.plot([x.step_frac for x in bucket.levels], [x.loss for x in bucket.levels], "k.-", lw=1, label="ladder")
        ax.set_title(size.name)
        ax.set_xlabel("step time, share of level 0")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("loss, nats per token")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
