"""The level log: bounded, by time, oldest first."""

from __future__ import annotations

from engine.level_log import LevelChange, LevelLog


def change(at_s: float) -> LevelChange:
    return LevelChange(
        at_s, level_before=0, level=2, since_launch_s=0.01, num_running=1, num_waiting=3, oldest_wait_s=0.5,
        setting_version=7,
    )  # fmt: skip


def test_by_time_oldest_first_and_bounded() -> None:
    log = LevelLog(capacity=4)
    for at_s in (1.0, 2.0, 3.0, 4.0, 5.0):
        log.append(change(at_s))
    assert [c.at_s for c in log.between(0.0, 9.0)] == [2.0, 3.0, 4.0, 5.0]
    assert [c.at_s for c in log.between(3.0, 5.0)] == [3.0, 4.0]
