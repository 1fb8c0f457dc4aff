"""What a burst's reaction is, by what replicas note of their requests and levels."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.reaction import SLO, Reaction, reaction_of, row_of, served

BURST_S = 100.0


def came(at_s: float, replica_id: str = "a") -> dict[str, Any]:
    return {"replica_id": replica_id, "ended_at_s": at_s + 3.0, "duration_s": 3.0}


def change(at_s: float, before: int, level: int, since_launch_s: float, replica_id: str = "a") -> dict[str, Any]:
    times = {"at_s": at_s, "since_launch_s": since_launch_s}
    return {"replica_id": replica_id, "level_before": before, "level": level, **times}


QUIET = came(99.0)


@pytest.mark.parametrize(
    ("changes", "requests", "expected"),
    [
        # One step at level 0 was launched after the burst's first request; the next one knew.
        ([change(100.09, 0, 3, 0.03)], [QUIET, came(100.02), came(100.07)], (0.03, 0.07, 0.03, 3)),
        # The step under way when the burst came was the last at level 0.
        ([change(100.05, 0, 2, 0.5)], [QUIET, came(100.02)], (0.03, 0.03, 0.5, 2)),
        # What happened before the burst, and later moves, say nothing.
        ([change(99.5, 0, 1, 0.01), change(99.9, 1, 0, 0.01), change(100.03, 0, 4, 0.02), change(100.2, 4, 5, 0.01)],
         [came(100.0)], (0.02, 0.03, 0.02, 4)),
        # The slower of two replicas.
        ([change(100.03, 0, 1, 0.02), change(100.06, 0, 1, 0.05, "b")], [came(100.0), came(100.0, "b")],
         (0.05, 0.06, 0.05, 1)),
        ([change(100.03, 0, 1, 0.02)], [came(100.0), came(100.0, "b")], None),
        # Dimmed already.
        ([change(99.9, 0, 2, 0.02), change(100.1, 2, 4, 0.02)], [came(100.0)], (0.0, 0.0, 0.0, 2)),
        ([], [came(100.0)], None),
        ([], [QUIET], None),
    ],
)  # fmt: skip
def test_the_reaction(
    changes: list[dict[str, Any]], requests: list[dict[str, Any]], expected: tuple[float, float, float, int] | None
) -> None:
    reaction = reaction_of(changes, requests, BURST_S)
    if expected is None:
        assert reaction is None
    else:
        assert reaction is not None
        told = (reaction.reaction_s, reaction.since_burst_s, reaction.step_s, reaction.level)
        assert told == pytest.approx(expected)


def test_a_row_tells_that_there_was_no_reaction() -> None:
    assert row_of(1, None, 0, 0.0, [], 2.0)["reaction_s"] is None
    row = row_of(1, Reaction(0.02, 0.03, 0.02, 4), 6, 0.01, [], 2.0)
    assert (row["live"], row["reaction_s"], row["level_first"], row["moves_per_s"]) == (True, 0.02, 4, 3.0)


def test_what_is_served() -> None:
    file = served(num_replicas=2)
    assert (len(file.configs), file.num_replicas) == (1, 2)
    assert (file.config.slo.ttft_s, file.config.slo.tpot_s) == (SLO.ttft_s, SLO.tpot_s)
