"""The demo on a short scenario: real processes from start to end, and nothing left of them."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from benchmarks.scenario import REPOSITORY
from cluster.local.processes import free_ports
from tests.waiting import until

pytestmark = pytest.mark.cluster

END_TIMEOUT_S = 500
TRACE = "DEMO_TEST"


@pytest.fixture
def scenario(tmp_path) -> Path:
    """The shipped demo, on a free port and shortened; too short to show what brownout is good for."""
    shipped = yaml.safe_load((REPOSITORY / "benchmarks/scenarios/demo.yaml").read_text())
    serve = yaml.safe_load((REPOSITORY / shipped["serve_config"]).read_text())
    serve["http_options"]["port"] = free_ports(1)[0]
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(serve))
    for phase in shipped["phases"]:
        phase["duration_s"] = 1
    short = {
        "serve_config": str(tmp_path / "serve.yaml"),
        "capacity": {"concurrency": 16, "ramp_s": 1, "measure_s": 3},
        "settle_s": 1,
        "output_tokens": {"low": 4, "high": 8},  # on a slow machine too, some end while the capacity is measured
    }
    path = tmp_path / "scenario.yaml"
    path.write_text(yaml.safe_dump(shipped | short))
    return path


@pytest.fixture
def demo(scenario, tmp_path):
    """The running demo; whatever it starts inherits an environment variable by which it can be found."""
    command = [sys.executable, "-u", "-m", "benchmarks.demo", "--scenario", str(scenario), "--out", str(tmp_path)]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=os.environ | {TRACE: str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    yield process
    process.kill()
    process.wait()
    for pid in left_running(tmp_path):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def left_running(tmp_path: Path) -> list[int]:
    """Processes that the demo started and that are still there; zombies have no environment."""
    entry = f"{TRACE}={tmp_path}".encode()
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if entry in (directory / "environ").read_bytes().split(b"\0"):
                found.append(int(directory.name))
        except OSError:
            continue
    return found


def test_a_short_demo_measures_both_runs_and_leaves_nothing(demo, tmp_path):
    output, _ = demo.communicate(timeout=END_TIMEOUT_S)
    assert demo.returncode == 0, output
    assert "seconds in violation" in output
    report = json.loads((tmp_path / "report.json").read_text())
    off, on = report["runs"]["off"], report["runs"]["on"]
    assert off["requests"] == on["requests"] > 0
    assert off["failed"] == on["failed"] == 0
    assert off["level_peak"] == 0 and off["dimmed_share"] == 0
    assert 0 <= on["level_peak"] < len(report["step_time_s_by_level"])
    assert report["capacity_req_s"] > 0
    plain, *_, dimmed = sorted(report["samples"], key=lambda sample: sample["level"])
    assert plain["level"] == plain["dimmed_share"] == 0 and dimmed["level"] > 0 and dimmed["dimmed_share"] > 0.1
    assert all(sample["prompt"] in output.replace("\n", " ") and len(sample["text"]) > 40 for sample in (plain, dimmed))
    assert (tmp_path / "burst.png").stat().st_size > 0
    until(lambda: left_running(tmp_path) == [])


def test_an_interrupted_demo_leaves_nothing(demo, tmp_path):
    assert any("cluster is up" in line for line in demo.stdout)
    assert len(left_running(tmp_path)) > 5
    demo.send_signal(signal.SIGINT)
    output, _ = demo.communicate(timeout=END_TIMEOUT_S)
    assert demo.returncode == 130, output
    assert "Traceback" not in output
    until(lambda: left_running(tmp_path) == [])
    assert not (tmp_path / "report.json").exists()
