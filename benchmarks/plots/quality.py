"""The picture of a quality table: loss against the distinct experts that a step reads, one panel for each step size.

    python -m benchmarks.plots.quality [benchmarks/results/quality.json]

draws it beside the file. Needs matplotlib (the extra "bench").
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.results import RESULTS

Row = Mapping[str, Any]
SIZES = (8, 32, 128, "prefill 2048")
STYLES = {  # dimmer and way |-> label, color, marker
    ("united", 2): ("united, 2-way", "#9bc4dd", "o"),
    ("united", 4): ("united, 4-way", "#4b93bd", "o"),
    ("united", 8): ("united, 8-way", "#1d4e6f", "o"),
    ("paper", 4): ("paper's rule, 4-way", "0.45", "x"),
    ("random mask", 4): ("random hot set, 4-way", "0.7", "+"),
    ("piggyback", 1): ("piggyback", "#e0a030", "s"),
    ("similar", 1): ("similar (SERE)", "#8a6fb0", "^"),
    ("topk", 1): ("top-k", "#d1495b", "v"),
}
LARGEST_LOSS = 0.6  # top-1 lies far beyond


def draw_quality(rows: Sequence[Row], path: Path) -> None:
    """Writes the picture to ``path``."""
    figure, panels = plt.subplots(1, len(SIZES), sharey=True, figsize=(14, 4), layout="constrained")
    for axes, size in zip(panels, SIZES, strict=True):
        _draw_size([row for row in rows if row["batch"] == size], axes)
        axes.set_title(size if isinstance(size, str) else f"decode, batch {size}", fontsize=10)
    panels[0].set_ylabel("loss against level 0 (nats per token)")
    panels[2].legend(frameon=False, fontsize=8, loc="lower left")  # the first with every dimmer
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_size(rows: Sequence[Row], axes: Axes) -> None:
    exact = next(row for row in rows if row["dimmer"] == "exact")
    axes.axvline(exact["experts"], color="0.85", lw=1)
    axes.axhline(0.05, color="0.85", lw=1, ls="--")
    for (dimmer, way), (label, color, marker) in STYLES.items():
        points = sorted(
            (row["experts"], row["dnll"], row["se"])
            for row in rows
            if row["dimmer"] == dimmer and row["way"] == way and row["build"] in ("", "routed")
        )
        points = [point for point in points if point[1] < LARGEST_LOSS]
        if points:
            experts, losses, errors = zip(*points, strict=True)
            axes.errorbar(experts, losses, errors, color=color, marker=marker, ms=5, lw=1.2, label=label)
    axes.set_xlabel("distinct experts a step reads, of 60")
    axes.set_yscale("symlog", linthresh=0.02)
    axes.set_ylim(-0.01, LARGEST_LOSS)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks([0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5])
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "quality.json"
    draw_quality(json.loads(path.read_text())["rows"], path.with_suffix(".png"))
    print(f"wrote {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
