"""The truth table of the PI law, and that its integral never winds up."""

from __future__ import annotations

import pytest

from controller.laws.pi import PiLaw, PiParams, PiState
from controller.types import Decision, Observation, PhaseDecision, Reason
from tests.unit.controller.laws.observations import SLO, observed

LAW = PiLaw(SLO, PiParams())
HALF = PiState(0.5, 0.5, 0.5, 0.5, stepped_at_s=0.0)


def settle(state: PiState, seen: Observation, seconds: float) -> tuple[PiState, Decision]:
    start_s = state.stepped_at_s or 0.0
    for tick in range(1, round(4 * seconds) + 1):
        state, decision = LAW.step(state, seen, start_s + tick / 4)
    return state, decision


@pytest.mark.parametrize(
    ("seen", "sign", "reason"),
    [
        pytest.param(observed(ttft_p90_s=1.5, tpot_p90_s=0.05), 1, Reason.SLO_VIOLATED, id="ttft-above"),
        pytest.param(observed(ttft_p90_s=0.2, tpot_p90_s=0.15), 1, Reason.SLO_VIOLATED, id="tpot-above"),
        pytest.param(observed(oldest_wait_s=1.5), 1, Reason.SLO_VIOLATED, id="still-waiting-counts"),
        pytest.param(observed(ttft_p90_s=0.95, tpot_p90_s=0.095), 1, Reason.SLO_MET, id="above-the-target"),
        pytest.param(observed(ttft_p90_s=0.2, tpot_p90_s=0.02), -1, Reason.HEADROOM, id="below"),
        pytest.param(observed(), 0, Reason.NO_DATA, id="unknown"),
        pytest.param(observed(ttft_p90_s=1.5, num_stale=1), 0, Reason.STALE_DATA, id="overdue"),
    ],
)
def test_truth_table(seen: Observation, sign: int, reason: Reason) -> None:
    _, decision = settle(HALF, seen, 4.0)
    assert (decision.decode.floor > 5) - (decision.decode.floor < 5) == sign
    assert decision.reason is reason
    assert decision.decode.floor == decision.decode.ceiling == decision.prefill.floor


def test_saturation_does_not_wind_up() -> None:
    """However long the overload lasted, the way down takes as long."""
    calm = observed(ttft_p90_s=0.1, tpot_p90_s=0.01)
    levels = []
    for overload_s in (10.0, 600.0):
        state, decision = settle(HALF, observed(ttft_p90_s=5.0, tpot_p90_s=0.05), overload_s)
        assert decision.decode.floor == 10
        levels.append(settle(state, calm, 3.0)[1].decode.floor)
    assert levels[0] == levels[1] < 10


def test_losing_one_signal_does_not_dim_more() -> None:
    state, decision = settle(HALF, observed(ttft_p90_s=0.5, tpot_p90_s=0.05), 1.0)
    _, after = settle(state, observed(tpot_p90_s=0.05), 0.25)
    assert after.decode.floor <= decision.decode.floor


def test_a_restart_continues_from_the_level_in_force() -> None:
    in_force = PhaseDecision(floor=6, ceiling=6, budget_s=SLO.tpot_s, margin=1.0)
    state = LAW.initial(Decision(in_force, in_force, "aimd", Reason.SLO_VIOLATED))
    _, decision = LAW.step(state, observed(), 0.0)
    assert decision.decode == in_force
