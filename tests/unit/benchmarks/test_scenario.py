"""Scenario files: the shipped one loads, a wrong one is refused in one sentence."""

import pytest
import yaml

from benchmarks.scenario import REPOSITORY, ScenarioError, load_scenario

DEMO = REPOSITORY / "benchmarks/scenarios/demo.yaml"


def test_the_demo_scenario_is_quiet_burst_quiet():
    scenario = load_scenario(DEMO)
    assert [p.name for p in scenario.phases] == ["quiet", "burst", "quiet"]
    start_s, end_s = scenario.peak_s
    assert scenario.phase_at(start_s - 0.1) == "quiet"
    assert scenario.phase_at(start_s) == scenario.phase_at(end_s - 0.1) == "burst"
    assert scenario.phase_at(end_s) == "quiet"
    assert scenario.phase_at(sum(p.duration_s for p in scenario.phases)) == "drain"


def test_a_workload_follows_the_capacity_and_the_seed():
    scenario = load_scenario(DEMO)
    workload = scenario.workload(capacity_req_s=20, vocab_size=100)
    assert workload == scenario.workload(capacity_req_s=20, vocab_size=100)
    start_s, end_s = scenario.peak_s
    in_burst = sum(start_s <= a.at_s < end_s for a in workload.arrivals)
    expected = 20 * max(phase.load for phase in scenario.phases) * (end_s - start_s)
    assert abs(in_burst - expected) < 4 * expected**0.5


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"arrival_cv": -1}, "arrival_cv: Input should be greater than 0, got -1"),
        ({"phases": []}, "phases: Tuple should have at least 1 item"),
        ({"sede": 3}, "sede: Extra inputs are not permitted, got 3"),
        ({"prompt_tokens": {"low": 9, "high": 2}}, "prompt_tokens: .*low is 9; allowed: at most high"),
    ],
)
def test_a_wrong_value_is_named(tmp_path, change, sentence):
    path = tmp_path / "scenario.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(DEMO.read_text()) | change))
    with pytest.raises(ScenarioError, match=sentence) as caught:
        load_scenario(path)
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ScenarioError, match=r"missing\.yaml: No such file"):
        load_scenario(tmp_path / "missing.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\nb: 2")
    with pytest.raises(ScenarioError, match=r"broken\.yaml is not YAML"):
        load_scenario(broken)
