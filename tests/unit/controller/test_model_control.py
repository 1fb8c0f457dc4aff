"""Numbering of settings: they only grow, an unchanged decision keeps its number, no life repeats another's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.config import ControllerConfig
from controller.laws.base import LawError
from controller.model_control import ModelControl, Policy
from controller.planner import PlannerParams
from controller.reports import Hello, StepWindow
from controller.types import Decision, PhaseDecision, Reason, Setting

CONFIG = ControllerConfig(law="static", level=2)


def hello(replica_id: str = "a", num_levels: int = 5, applied: tuple[int, int] = (0, 0)) -> Hello:
    return Hello(replica_id, "model", 1, num_levels, True, *applied)


@pytest.fixture
def control() -> ModelControl:
    return ModelControl("model", CONFIG, Policy("static", CONFIG.params), epoch=3)


def test_without_replicas_nothing_is_decided(control: ModelControl) -> None:
    assert control.tick(0.0) is None
    assert control.to_save is None


def test_an_unchanged_decision_keeps_its_version(control: ModelControl) -> None:
    control.join(hello(), 0.0)
    first = control.tick(0.0)
    assert first is not None and (first.epoch, first.version, first.lease_s) == (3, 1, CONFIG.lease_s)
    assert control.tick(0.25) is None
    assert control.setting is first


def test_a_shorter_ladder_is_a_new_setting(control: ModelControl) -> None:
    control.join(hello("a", num_levels=5), 0.0)
    control.tick(0.0)
    control.join(hello("b", num_levels=2), 0.1)
    setting = control.tick(0.1)
    assert setting is not None and setting.version == 2
    assert setting.decision.decode.ceiling == 1


def test_policy_changes_at_the_next_tick(control: ModelControl) -> None:
    control.join(hello(), 0.0)
    control.tick(0.0)
    control.set_policy(Policy("static", {"level": 0}))
    setting = control.tick(0.1)
    assert setting is not None and setting.version == 2
    assert setting.decision.reason is Reason.BROWNOUT_OFF


def test_a_bad_policy_changes_nothing(control: ModelControl) -> None:
    with pytest.raises(LawError):
        control.set_policy(Policy("pid"))
    assert control.policy.law == "static"


def test_a_restored_setting_is_continued(control: ModelControl) -> None:
    control.join(hello(), 0.0)
    saved = control.tick(0.0)
    assert saved is not None
    later = ModelControl("model", CONFIG, Policy("static", CONFIG.params), epoch=4)
    later.restore(saved)
    assert later.to_save is not None and later.to_save.decision == saved.decision
    later.join(hello(applied=(3, 1)), 0.0)
    setting = later.tick(0.0)
    assert setting is not None and (setting.epoch, setting.version) == (4, 2)


def test_versions_go_above_what_a_replica_has_applied(control: ModelControl) -> None:
    control.join(hello(applied=(2, 40)), 0.0)
    setting = control.tick(0.0)
    assert setting is not None and (setting.epoch, setting.version) == (3, 41)


def test_a_new_epoch_numbers_the_same_decision_anew(control: ModelControl) -> None:
    control.join(hello(), 0.0)
    first = control.tick(0.0)
    control.begin_epoch(3)
    assert control.tick(0.1) is None
    control.begin_epoch(9)
    again = control.tick(0.2)
    assert first is not None and again is not None
    assert (again.epoch, again.version, again.decision) == (9, 2, first.decision)


def fleet_report(replica_id: str, sequence: int, waiting: int) -> StepWindow:
    return StepWindow(
        replica_id,
        "model",
        1,
        sequence,
        0.25,
        num_running=16,
        num_waiting=waiting,
        predicted_step_time_s=(0.09, 0.08, 0.07, 0.06, 0.05),
    )


def test_a_crowd_gets_more_replicas() -> None:
    config = replace(CONFIG, planner=PlannerParams(max_replicas=3, down_after_s=5.0))
    control = ModelControl("model", config, Policy("static", config.params), epoch=1)
    profile = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "full_step_time_s": (0.09, 0.08, 0.07, 0.06, 0.05)}
    control.join(replace(hello("a"), **profile, start_s=7.0), 0.0)
    control.tick(0.0)
    control.tick_plan(0.0)
    assert control.plan is not None and (control.plan.desired, control.plan.reason) == (1, "no_data")
    control.window.offer(fleet_report("a", 1, waiting=40), 1.0)
    control.tick(1.0)
    assert control.tick_plan(1.0)
    assert control.plan.desired == 3 and control.plan.cold_start_s == 7.0
    control.join(replace(hello("b"), **profile), 10.0)
    control.window.offer(fleet_report("a", 2, waiting=0), 10.0)
    control.tick_plan(10.0)
    assert control.fleet is not None
    assert (control.fleet.num_ready, control.fleet.num_starting, control.fleet.cold_start_s) == (2, 1, 9.0)


def test_without_a_planner_nothing_is_planned(control: ModelControl) -> None:
    assert control.tick_plan(0.0) is False
    control.join(hello(), 0.0)
    control.tick(0.0)
    control.tick_plan(0.0)
    assert control.plan is None


def test_the_decision_that_a_replica_follows_is_where_a_law_without_memory_begins() -> None:
    phase = PhaseDecision(3, 3, 0.1, 1.0)
    followed = Setting(Decision(phase, phase, "aimd", Reason.SLO_VIOLATED), "model", 2, 8, 2.0)
    config = replace(CONFIG, law="aimd", level=0, slew_levels=1)
    control = ModelControl("model", config, Policy("aimd"), epoch=3)
    control.join(replace(hello(applied=(2, 8)), applied=followed), 0.0)
    setting = control.tick(0.0)
    assert setting is not None and setting.version == 9
    assert abs(setting.decision.decode.floor - 3) <= 1
