"""The guard's truth table: no quality curve, no dimming, unless it is allowed by name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.guard import guarded_step
from controller.laws.base import create_law
from controller.types import Observation, Reason, Slo

SEEN = Observation(num_replicas=1, num_levels=8)


@pytest.mark.parametrize(
    ("measured", "allowed", "ceiling", "reason"),
    [
        (True, False, 5, Reason.PINNED),
        (True, True, 5, Reason.PINNED),
        (False, True, 5, Reason.PINNED),
        (False, False, 0, Reason.UNMEASURED_LADDER),
    ],
)
def test_truth_table(measured: bool, allowed: bool, ceiling: int, reason: Reason) -> None:
    law = create_law("static", Slo(1.0, 0.1), {"level": 5})
    _, decision = guarded_step(law, law.initial(), replace(SEEN, ladder_measured=measured), 0.0, allowed)
    assert (decision.prefill.ceiling, decision.decode.ceiling) == (ceiling, ceiling)
    assert decision.reason is reason


def test_off_stays_off_by_the_operators_reason() -> None:
    law = create_law("static", Slo(1.0, 0.1), {"level": 0})
    _, decision = guarded_step(law, None, SEEN, 0.0, allow_unmeasured=False)
    assert decision.reason is Reason.BROWNOUT_OFF


def test_the_threshold_of_a_forbidden_ladder_does_not_wind_down() -> None:
    law = create_law("predictive", Slo(1.0, 0.1))
    state = law.initial()
    for now_s in range(20):
        state, decision = guarded_step(law, state, replace(SEEN, tpot_p90_s=9.0), float(now_s), allow_unmeasured=False)
    assert decision.decode.margin == 0.92
