"""The simulator on small cases whose outcome can be told beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.simulator.__main__ import main
from benchmarks.simulator.cluster import SimulatedCluster
from benchmarks.simulator.events import EventLoop
from benchmarks.simulator.plant import Load, Plant
from benchmarks.simulator.runs import measure_capacity, policy_of, run_once, summarize
from benchmarks.simulator.scenario import SCENARIOS, ScenarioFile, SimulationError, load_scenario
from benchmarks.simulator.traffic import Request, Traffic, build_traffic

SCENARIO_NAMES = [path.stem for path in SCENARIOS.glob("*.yaml") if not path.stem.startswith("_")]
BURST = str(Path(__file__).with_name("burst.yaml"))
TOP = 3


def small(**overrides: object) -> ScenarioFile:
    return load_scenario(BURST, overrides)


def test_events_run_in_order_of_time_and_ties_in_order_of_arrival() -> None:
    loop, seen = EventLoop(), []
    for when_s, name in ((2.0, "c"), (1.0, "a"), (1.0, "b")):
        loop.at(when_s, lambda name=name: seen.append((loop.now_s, name)))
    loop.run(lambda: False)
    assert seen == [(1.0, "a"), (1.0, "b"), (2.0, "c")]


def test_the_plant_is_what_was_measured() -> None:
    scenario = small()
    measured = json.loads(scenario.plant.profile_path.read_text())["decode_step_ms"]
    plant = Plant(scenario.plant)
    overhead_s = scenario.plant.overhead_s
    for level, table in ((0, "level0"), (2, "way2"), (TOP, "way8")):
        for size in ("8", "64", "256"):
            step_s = plant.step_s(Load(num_decodes=int(size)), level, level)
            assert step_s == pytest.approx(overhead_s + measured[table][size] / 1e3)
    assert Plant(scenario.plant, speed=0.5).step_s(Load(8), 0, 0) == pytest.approx(2 * plant.step_s(Load(8), 0, 0))


def test_plant_dimming_pays_less_the_more_rows_refuse_and_the_longer_the_prefill() -> None:
    plant = Plant(small().plant)

    def saved(load: Load) -> float:
        return 1 - plant.step_s(load, TOP, TOP) / plant.step_s(load, 0, 0)

    by_exact = [saved(Load(num_decodes=64, num_exact=n)) for n in (0, 8, 64)]
    by_prefill = [saved(Load(num_decodes=64, num_prefill_tokens=n)) for n in (0, 1000, 8000)]
    for savings in (by_exact, by_prefill):
        assert savings == sorted(savings, reverse=True)
    assert by_exact[0] > 0.4
    assert by_exact[-1] < 0.01
    assert plant.step_s(Load(64, context_tokens=64 * 1000), 0, 0) > plant.step_s(Load(64), 0, 0)


def test_a_single_request_takes_as_long_as_its_steps() -> None:
    scenario = small()
    plant, delay_s = Plant(scenario.plant), scenario.network_delay_s
    traffic = Traffic((Request(1.0, 100, 3),), 2.0)
    outcome = SimulatedCluster(scenario, policy_of("none", scenario), 1).run(traffic)
    (record,) = outcome.logs[0].records
    prefill_s = plant.step_s(Load(num_prefill_tokens=100), 0, 0)
    decode_s = plant.step_s(Load(num_decodes=1, context_tokens=101), 0, 0)
    assert record.ttft_s == pytest.approx(delay_s + prefill_s)
    assert record.tpot_s == pytest.approx(decode_s, rel=0.01)
    row = summarize(scenario, "none", 1, traffic, outcome).row
    assert (row.attainment, row.violation_s, row.mean_loss) == (1.0, 0, 0.0)


def test_equal_seeds_give_equal_runs_and_laws_see_equal_arrivals() -> None:
    scenario = small()
    first, again, other_law = (run_once(scenario, law, 3, 100.0) for law in ("predictive", "predictive", "none"))
    assert first.row == again.row
    assert [s.num_arrivals for s in first.seconds] == [s.num_arrivals for s in other_law.seconds]
    assert build_traffic(scenario, 100.0, 3) != build_traffic(scenario, 100.0, 4)


def test_dimming_keeps_the_promise_that_level_0_breaks() -> None:
    scenario = small()
    capacity_req_s = measure_capacity(scenario)
    none, predictive, strongest = (
        run_once(scenario, law, 1, capacity_req_s).row for law in ("none", "predictive", "strongest")
    )
    assert none.attainment < 0.8
    assert predictive.attainment > 0.97
    assert none.mean_loss == 0 < predictive.mean_loss < strongest.mean_loss
    assert strongest.mean_loss == pytest.approx(scenario.plant.levels[-1].loss)
    assert predictive.reaction_s is not None and predictive.reaction_s < 0.05


def test_capacity_scales_with_the_fleet() -> None:
    one = measure_capacity(small())
    one_fast_one_slow = measure_capacity(small(**{"fleet.replicas": 2, "fleet.speeds": [0.5]}))
    assert one_fast_one_slow == pytest.approx(1.5 * one)


def test_a_large_fleet_is_sampled() -> None:
    scenario = small(**{"fleet.replicas": 10_000, "fleet.sample": 2})
    traffic = build_traffic(scenario, 10_000 * 100.0, 1)
    outcome = SimulatedCluster(scenario, policy_of("predictive", scenario), 1).run(traffic)
    assert len(outcome.logs) == 2
    assert len(traffic.requests) == pytest.approx(2 * 100 * (1 + 4.8 + 0.8), rel=0.15)
    assert sum(len(log.records) for log in outcome.logs) == len(traffic.requests)


def test_a_split_gives_the_first_replica_its_share() -> None:
    scenario = small(**{"fleet.replicas": 3, "fleet.routing": "split", "fleet.first_share": 0.1})
    traffic = Traffic(tuple(Request(0.01 * i, 16, 4) for i in range(200)), 2.0)
    outcome = SimulatedCluster(scenario, policy_of("none", scenario), 1).run(traffic)
    first, *others = (len(log.records) for log in outcome.logs)
    assert first == 20
    assert sum(others) == 180 and min(others) > 60


def test_a_slow_replica_is_sent_less_and_dims_less_than_by_shortest_queue() -> None:
    """The policy learns how slow it is from the loads that it publishes; nobody dims while others have room."""
    fleet = {"fleet.replicas": 2, "fleet.speeds": [0.5]}
    capacity_req_s = measure_capacity(small(**fleet))
    phases = {"traffic.phases": [{"name": "load", "duration_s": 8, "load": 0.8}]}
    by_policy, by_queue = (
        run_once(small(**fleet, **phases, **{"fleet.routing": routing}), "predictive", 1, capacity_req_s)
        for routing in ("load", "shortest_queue")
    )
    slow, fast = (len(log.records) for log in by_policy.outcome.logs)
    assert slow < fast / 2
    assert by_policy.row.mean_loss < 0.6 * by_queue.row.mean_loss
    assert by_policy.row.attainment >= by_queue.row.attainment


@pytest.mark.parametrize("name", SCENARIO_NAMES)
def test_every_scenario_can_be_read(name: str) -> None:
    scenario = load_scenario(name)
    assert scenario.name == name
    assert Plant(scenario.plant).num_levels == len(scenario.plant.levels)
    losses = [level.loss for level in scenario.plant.levels]
    assert losses == sorted(losses)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("nothing", {}, "there is no scenario 'nothing'"),
        (BURST, {"slo.ttft_s": -1}, "slo.ttft_s"),
        (BURST, {"colour": "red"}, "colour"),
        (BURST, {"traffic.phases": []}, "either phases or a trace"),
    ],
)
def test_a_bad_scenario_is_named(name: str, overrides: dict, message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        load_scenario(name, overrides)


def test_the_command_writes_rows_and_a_picture(tmp_path: Path) -> None:
    laws = ["--law", "predictive", "--law", "static:2", "--seeds", "1", "--set", "profile_error=0.9"]
    assert main([BURST, *laws, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["law"] for row in rows] == ["predictive", "static:2"]
    assert rows[1]["mean_loss"] == pytest.approx(0.03)
    assert (tmp_path / "burst.png").stat().st_size > 10_000
    assert main([BURST, "--law", "fuzzy"]) == 2
