"""The truth table of the paper's law, and its published pace."""

from __future__ import annotations

import pytest

from controller.laws.aimd import AimdLaw, AimdParams, AimdState
from controller.types import Decision, PhaseDecision, Reason
from tests.unit.controller.laws.observations import SLO, observed

LAW = AimdLaw(SLO, AimdParams())


@pytest.mark.parametrize(
    ("p90_frac", "p_before", "p_after", "reason"),
    [
        (1.01, 1.0, 0.8, Reason.SLO_VIOLATED),
        (1.01, 0.5, 0.4, Reason.SLO_VIOLATED),
        (1.0, 0.5, 0.5, Reason.SLO_MET),
        (0.8, 0.5, 0.5, Reason.SLO_MET),
        (0.79, 0.5, 0.6, Reason.HEADROOM),
        (0.79, 0.95, 1.0, Reason.HEADROOM),
        (None, 0.5, 0.5, Reason.NO_DATA),
    ],
)
def test_truth_table(p90_frac: float | None, p_before: float, p_after: float, reason: Reason) -> None:
    prefill_s = None if p90_frac is None else p90_frac * SLO.ttft_s
    decode_s = None if p90_frac is None else p90_frac * SLO.tpot_s
    state, decision = LAW.step(AimdState(p_before, p_before), observed(prefill_s, decode_s), 0.0)
    assert state.p_prefill == pytest.approx(p_after)
    assert state.p_decode == pytest.approx(p_after)
    assert decision.reason is reason


def test_phases_have_their_own_threshold_and_the_worse_one_gives_the_reason() -> None:
    state, decision = LAW.step(AimdState(0.5, 0.5), observed(prefill_p90_s=0.1, decode_p90_s=0.2), 0.0)
    assert (state.p_prefill, state.p_decode) == pytest.approx((0.6, 0.4))
    assert (decision.prefill.floor, decision.decode.floor) == (4, 6)
    assert decision.reason is Reason.SLO_VIOLATED


def test_nothing_moves_between_two_checks() -> None:
    state, first = LAW.step(LAW.initial(), observed(decode_p90_s=0.2), 0.0)
    for now_s in (0.25, 2.0, 4.99):
        state, decision = LAW.step(state, observed(decode_p90_s=0.2), now_s)
        assert decision == first
    _, decision = LAW.step(state, observed(decode_p90_s=0.2), 5.0)
    assert decision.decode.floor > first.decode.floor


def test_published_pace() -> None:
    """Five checks, 25 s, bring the threshold from 1 to 0.33; each quiet check gives 0.1 back."""
    state = LAW.initial()
    for check in range(5):
        state, decision = LAW.step(state, observed(decode_p90_s=0.2), 5.0 * check)
    assert state.p_decode == pytest.approx(0.8**5)
    assert decision.decode == PhaseDecision(floor=7, ceiling=7, budget_s=SLO.tpot_s, margin=1.0)
    for check in range(5, 12):
        state, decision = LAW.step(state, observed(decode_p90_s=0.01), 5.0 * check)
    assert state.p_decode == 1.0
    assert decision.decode.floor == 0


def test_endless_violation_stays_in_bounds() -> None:
    state = LAW.initial()
    for check in range(5000):
        state, decision = LAW.step(state, observed(decode_p90_s=0.2), 5.0 * check)
    assert 0 < state.p_decode <= 1
    assert decision.decode.floor == 10


def test_a_restart_continues_from_the_level_in_force() -> None:
    in_force = PhaseDecision(floor=6, ceiling=6, budget_s=SLO.tpot_s, margin=1.0)
    state = LAW.initial(Decision(in_force, in_force, "aimd", Reason.SLO_VIOLATED))
    _, decision = LAW.step(state, observed(), 0.0)
    assert decision.decode == in_force


def test_it_looks_at_two_seconds() -> None:
    assert LAW.window_s == 2.0
