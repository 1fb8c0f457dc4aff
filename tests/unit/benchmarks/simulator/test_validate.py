"""What the validation fits, and how results of parts are put together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.control import PLAN, save_rows
from benchmarks.simulator.plant import Load, Plant
from benchmarks.simulator.scenario import SimulationError, load_scenario
from benchmarks.simulator.validate import SERVE_FILE, fitted, scenario_of
from cluster.serve_file import load_serve_file
from engine.step_time import StepTimeModel

MODEL = StepTimeModel((1, 32), ((0.01, 0.1), (0.01, 0.05)))


def test_the_plant_takes_after_the_steps_that_ran() -> None:
    def step_s(level: int, num_tokens: int) -> float:
        return (0.02 + 0.004 * min(num_tokens, 16) + 0.001 * max(num_tokens - 16, 0)) / (1 + level)

    steps = [(level, n, step_s(level, n)) for level in (0, 1) for n in range(1, 49)]
    model = fitted(3, steps)
    for level, num_tokens in ((0, 4), (0, 40), (1, 10), (1, 60)):
        assert model.predict_s(level, num_tokens) == pytest.approx(step_s(level, num_tokens))
    assert model.predict_s(2, 30) == pytest.approx(step_s(1, 30))
    with pytest.raises(SimulationError, match="too few to fit"):
        fitted(2, steps[:5])


def test_the_twin_of_an_engine_takes_as_long_as_its_profile(tmp_path: Path) -> None:
    config = load_serve_file(SERVE_FILE).config.engine_config()
    scenario = scenario_of(config, MODEL, (0.0, 0.1), tmp_path)
    plant = Plant(scenario.plant)
    for level in (0, 1):
        step_s = plant.step_s(Load(num_decodes=20, context_tokens=4000), level, level)
        assert step_s == pytest.approx(MODEL.predict_s(level, 20))
    assert scenario.engine.max_num_seqs == config.scheduler.max_num_seqs


def test_parts_of_the_results_are_replaced_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "control.json"
    save_rows(path, "steady", [{"scenario": "steady", "live": False, "seed": 1}])
    save_rows(path, "burst_1.6x", [{"scenario": "burst_1.6x", "live": False, "seed": s} for s in (1, 2)])
    save_rows(path, "cpu_burst", [{"scenario": "cpu_burst", "live": True, "seed": 1}], live=True)
    save_rows(path, "burst_1.6x", [{"scenario": "burst_1.6x", "live": False, "seed": 3}])
    rows = json.loads(path.read_text())["rows"]
    assert [(row["scenario"], row["seed"]) for row in rows] == [("burst_1.6x", 3), ("steady", 1), ("cpu_burst", 1)]


def test_every_planned_scenario_exists() -> None:
    for name in PLAN:
        load_scenario(name)
