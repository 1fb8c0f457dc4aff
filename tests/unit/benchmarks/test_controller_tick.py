"""The tick benchmark drives the controller as its streams do."""

from __future__ import annotations

from benchmarks.controller_tick import Fleet, time_ticks
from controller.window import Verdict


def test_every_report_is_believed_and_counted() -> None:
    fleet = Fleet.of(5, seed=1)
    for tick in range(1, 5):
        fleet.step(fleet.read(fleet.messages(tick)), tick * 0.25)
    assert fleet.control.window.num_windows[Verdict.ACCEPTED] == 20
    assert fleet.control.observation.num_replicas == 5
    assert fleet.control.observation.ttft_p90_s is not None
    assert fleet.control.setting is not None


def test_times_are_reported_for_reading_and_for_the_tick() -> None:
    figures = time_ticks(3, 4, seed=1)
    assert 0 < figures["tick_p50_ms"] <= figures["tick_p90_ms"] <= figures["tick_max_ms"]
    assert figures["read_p50_ms"] > 0
