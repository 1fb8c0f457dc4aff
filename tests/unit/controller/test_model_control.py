"""Numbering of settings: they only grow, an unchanged decision keeps its number, no life repeats another's."""

from __future__ import annotations

import pytest

from controller.config import ControllerConfig
from controller.laws.base import LawError
from controller.model_control import ModelControl, Policy
from controller.reports import Hello
from controller.types import Reason

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
