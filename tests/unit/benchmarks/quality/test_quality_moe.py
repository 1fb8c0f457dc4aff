"""The report of quality-moe says what is missing, and needs no ladder."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.quality.quality_moe import Run, report_stage
from benchmarks.results import RESULTS


@pytest.fixture
def run(tmp_path: Path) -> Run:
    options = Namespace(device="cpu", work=tmp_path / "work", out=tmp_path / "quality.json", minutes=1.0)
    options.work.mkdir()
    return Run(options)


def test_the_report_names_the_stage_that_has_not_run(run: Run) -> None:
    with pytest.raises(SystemExit, match=r"rows-0\.jsonl is missing: the stage 'evaluate' has not run"):
        report_stage(run)


def test_the_report_leaves_out_a_ladder_that_is_not_there(run: Run) -> None:
    published = json.loads((RESULTS / "quality.json").read_text())
    (run.work / "rows-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in published["rows"]))
    (run.work / "training.json").write_text(json.dumps(published["training"]))
    (run.work / "united").mkdir()
    report_stage(run)
    written = json.loads(run.options.out.read_text())
    assert "ladder" not in written
    assert written["claims"]["C1"] == published["claims"]["C1"]  # the same rows, the same verdict
