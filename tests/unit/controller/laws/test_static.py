"""The truth table of the static law."""

from __future__ import annotations

import pytest

from controller.laws.base import create_law
from controller.types import Reason
from tests.unit.controller.laws.observations import SLO, observed


@pytest.mark.parametrize(
    ("asked", "top", "level", "reason"),
    [
        (0, 0, 0, Reason.BROWNOUT_OFF),
        (0, 7, 0, Reason.BROWNOUT_OFF),
        (3, 7, 3, Reason.PINNED),
        (7, 7, 7, Reason.PINNED),
        (9, 7, 7, Reason.PINNED),
        (9, 0, 0, Reason.PINNED),
    ],
)
def test_truth_table(asked: int, top: int, level: int, reason: Reason) -> None:
    law = create_law("static", SLO, {"level": asked})
    for latency_s in (None, 0.001, 9.0):
        _, decision = law.step(law.initial(), observed(latency_s, latency_s, num_levels=top + 1), 0.0)
        assert (decision.prefill.floor, decision.prefill.ceiling) == (level, level)
        assert (decision.decode.floor, decision.decode.ceiling) == (level, level)
        assert decision.reason is reason
