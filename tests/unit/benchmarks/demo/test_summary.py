"""The demo's files: the report has the promised schema, the picture is a picture."""

import io
import json

import pytest
from rich.console import Console

from benchmarks.demo.samples import Sample
from benchmarks.demo.summary import Measurement, Run, render_table, write_results
from benchmarks.loadgen.closed_loop import Throughput
from benchmarks.loadgen.record import Outcome, RequestRecord
from benchmarks.plots.burst import LevelSample
from benchmarks.report import Slo, measure
from benchmarks.scenario import REPOSITORY, load_scenario
from engine.types import BrownoutUsage, ModelInfo

SCENARIO = load_scenario(REPOSITORY / "benchmarks/scenarios/demo.yaml")
SLO = Slo(ttft_s=1.0, tpot_s=0.2)
SAMPLE = Sample("demo-moe", "The lamp", level=2, dimmed_share=0.5, text=" burns.")
RUN_FIELDS = {
    "slo_attainment",
    "violation_s",
    *(f"{kind}_p{p}_s" for kind in ("ttft", "tpot") for p in (50, 90, 99)),
    "goodput_tok_s",
    "tok_s",
    "level_mean",
    "level_peak",
    "dimmed_share",
    "requests",
    "failed",
}


def run(ttft_s, level):
    records = [
        RequestRecord(
            scheduled_s=float(at_s),
            sent_s=float(at_s),
            outcome=Outcome.COMPLETED,
            first_token_s=at_s + ttft_s,
            last_token_s=at_s + ttft_s + 0.9,
            num_prompt_tokens=20,
            num_tokens=10,
            brownout=BrownoutUsage(100, 10 * level, level, float(level), 1),
        )
        for at_s in range(80)
    ]
    records.append(RequestRecord(80.0, 80.0, Outcome.TIMEOUT, error="no end within 1 s"))
    levels = [LevelSample(float(at_s), float(level)) for at_s in range(80)]
    return Run(measure(records, SLO, 80.0), records, levels)


@pytest.fixture
def measurement():
    model = ModelInfo("demo", 100, 256, 64, 16, 4, False, step_time_s_by_level=(0.08, 0.06, 0.05, 0.04))
    workload = SCENARIO.workload(capacity_req_s=2.0, vocab_size=100)
    return Measurement(model, SLO, Throughput(2.0, 70.0), workload, {"off": run(9.0, 0), "on": run(0.2, 2)}, [SAMPLE])


def test_report_and_picture(measurement, tmp_path):
    write_results(measurement, SCENARIO, tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert set(report["runs"]) == {"off", "on"}
    for figures in report["runs"].values():
        assert set(figures) >= RUN_FIELDS
    assert report["runs"]["off"]["violation_s"] == 81 and report["runs"]["on"]["violation_s"] == 1
    assert report["runs"]["on"]["dimmed_share"] == pytest.approx(0.2)
    phases = report["runs"]["on"]["phases"]
    assert [(p["name"], p["requests"], p["slo_attainment"]) for p in phases] == [
        ("quiet", 20, 1.0),
        ("burst", 40, 1.0),
        ("quiet", 20, 1.0),
    ]
    assert report["capacity_req_s"] == 2.0
    assert report["step_time_s_by_level"] == [0.08, 0.06, 0.05, 0.04]
    assert set(report) >= {"slo", "seed", "workload", "versions", "machine", "command"}
    assert (tmp_path / "out/burst.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_shows_both_runs(measurement):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render_table(measurement, SCENARIO))
    text = console.export_text()
    for cell in ("brownout off", "brownout on", "seconds in violation", "81", "20.0%", "0.200 / 0.200 / 0.200"):
        assert cell in text
