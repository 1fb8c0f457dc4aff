"""What a demo leaves behind: the table, ``report.json`` and ``burst.png``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import environment
from benchmarks.demo.samples import Sample
from benchmarks.loadgen.closed_loop import Throughput
from benchmarks.loadgen.record import RequestRecord
from benchmarks.plots.burst import LevelSample, RunCurve, draw_burst
from benchmarks.report import RunMetrics, Slo, by_second, measure
from benchmarks.scenario import Scenario
from benchmarks.workloads.workload import Workload
from engine.types import ModelInfo

COLORS = {"off": "#d1495b", "on": "#2e6f95"}


@dataclass(frozen=True, slots=True)
class Run:
    """One replay of the workload."""

    metrics: RunMetrics
    records: Sequence[RequestRecord]
    levels: Sequence[LevelSample]


@dataclass(frozen=True, slots=True)
class Measurement:
    """All that the demo measured."""

    model: ModelInfo
    slo: Slo
    capacity: Throughput
    workload: Workload
    runs: dict[str, Run]  # "off" and "on"
    samples: Sequence[Sample]


def write_results(measurement: Measurement, scenario: Scenario, out: Path) -> None:
    """Writes ``report.json`` and ``burst.png`` into the folder ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(_report(measurement, scenario), indent=2, allow_nan=False) + "\n")
    off, on = (measurement.runs[name].metrics for name in ("off", "on"))
    draw_burst(
        [
            RunCurve(f"brownout {name}", by_second(run.records), run.levels, COLORS[name])
            for name, run in measurement.runs.items()
        ],
        measurement.slo,
        measurement.model.num_levels,
        f"A burst of {max(p.load for p in scenario.phases):g} times the capacity: "
        f"{off.violation_s} s in violation without brownout, {on.violation_s} s with it",
        out / "burst.png",
        scenario.peak_s,
    )


def _report(measurement: Measurement, scenario: Scenario) -> dict[str, Any]:
    model = measurement.model
    return {
        "runs": {
            name: {**asdict(run.metrics), "phases": _by_phase(run, measurement.slo, scenario)}
            for name, run in measurement.runs.items()
        },
        "capacity_req_s": measurement.capacity.req_s,
        "capacity_tok_s": measurement.capacity.tok_s,
        "step_time_s_by_level": list(model.step_time_s_by_level),
        "level_names": list(model.level_names),
        "model": model.name,
        "samples": [asdict(sample) for sample in measurement.samples],
        "slo": asdict(measurement.slo),
        "seed": scenario.seed,
        "workload": scenario.model_dump(exclude={"seed"}),
        **environment.describe(),
    }


def _by_phase(run: Run, slo: Slo, scenario: Scenario) -> list[dict[str, Any]]:
    """The promise as kept for the requests that arrived in each phase: the quiet ones must keep it at level 0 too."""
    phases = []
    for index, phase in enumerate(scenario.phases):
        metrics = measure([r for r in run.records if scenario.phase_of(r.scheduled_s) == index], slo, phase.duration_s)
        figures = asdict(metrics)
        names = ("requests", "failed", "slo_attainment", "violation_s", "ttft_p90_s", "tpot_p90_s", "level_mean")
        phases.append({"name": phase.name, **{name: figures[name] for name in names}})
    return phases


def render_table(measurement: Measurement, scenario: Scenario) -> Table:
    slo = measurement.slo
    table = Table(
        title=f"SLO: TTFT {slo.ttft_s:g} s and mean TPOT {slo.tpot_s:g} s, capacity "
        f"{measurement.capacity.req_s:.1f} requests/s, seed {scenario.seed}"
    )
    table.add_column("")
    rows = {name: _cells(run.metrics) for name, run in measurement.runs.items()}
    for name in rows:
        table.add_column(f"brownout {name}", justify="right")
    for label in next(iter(rows.values())):
        table.add_row(label, *(cells[label] for cells in rows.values()))
    return table


def _cells(metrics: RunMetrics) -> dict[str, str]:
    """Label -> text, in the table's order."""

    def quantiles(kind: str) -> str:
        values = [getattr(metrics, f"{kind}_p{p}_s") for p in (50, 90, 99)]
        return " / ".join("-" if v is None else f"{v:.3f}" for v in values)

    return {
        "SLO attainment": f"{metrics.slo_attainment:.1%}",
        "seconds in violation": str(metrics.violation_s),
        "TTFT p50 / p90 / p99 (s)": quantiles("ttft"),
        "TPOT p50 / p90 / p99 (s)": quantiles("tpot"),
        "goodput (tokens/s)": f"{metrics.goodput_tok_s:.0f}",
        "throughput (tokens/s)": f"{metrics.tok_s:.0f}",
        "mean level": f"{metrics.level_mean:.2f}",
        "peak level": str(metrics.level_peak),
        "dimmed pairs": f"{metrics.dimmed_share:.1%}",
        "requests": str(metrics.requests),
        "failed": str(metrics.failed),
    }
