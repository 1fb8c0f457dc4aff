"""The truth table of the predictive law's slow loop, and its anti-windup."""

from __future__ import annotations

import pytest

from controller.laws.predictive import PredictiveLaw, PredictiveParams, PredictiveState
from controller.types import Reason
from tests.unit.controller.laws.observations import SLO, observed

LAW = PredictiveLaw(SLO, PredictiveParams())
TOP = 10


@pytest.mark.parametrize(
    ("tpot_frac", "level", "num_stale", "moves", "reason"),
    [
        (None, 0.0, 0, 0, Reason.NO_DATA),
        (None, 5.0, 0, 0, Reason.NO_DATA),
        (2.0, 5.0, 1, 0, Reason.STALE_DATA),
        (1.2, 0.0, 0, -1, Reason.SLO_VIOLATED),
        (1.2, 5.0, 0, -1, Reason.SLO_VIOLATED),
        (1.2, 10.0, 0, 0, Reason.SLO_VIOLATED),
        (1.2, 9.6, 0, 0, Reason.SLO_VIOLATED),
        (0.97, 5.0, 0, -1, Reason.SLO_MET),
        (0.5, 5.0, 0, +1, Reason.HEADROOM),
        (0.5, 0.0, 0, "decays", Reason.HEADROOM),
    ],
)
def test_truth_table(tpot_frac: float | None, level: float, num_stale: int, moves: object, reason: Reason) -> None:
    tpot_s = None if tpot_frac is None else tpot_frac * SLO.tpot_s
    seen = observed(decode_p90_s=0.05, level_mean=level, num_levels=TOP + 1, tpot_p90_s=tpot_s, num_stale=num_stale)
    before = PredictiveState(prefill_shift=0.05, decode_shift=0.05, stepped_at_s=0.0)
    after, decision = LAW.step(before, seen, 1.0)
    change = after.decode_shift - before.decode_shift
    if moves == "decays":
        assert 0 < after.decode_shift < before.decode_shift
    else:
        assert (change > 0) - (change < 0) == moves
    assert after.prefill_shift == before.prefill_shift
    assert decision.reason is reason
    assert (decision.decode.floor, decision.decode.ceiling) == (0, TOP)


def test_starting_margins() -> None:
    _, decision = LAW.step(LAW.initial(), observed(), 0.0)
    assert (decision.prefill.margin, decision.decode.margin) == (0.27, 0.92)
    assert (decision.prefill.budget_s, decision.decode.budget_s) == (SLO.ttft_s, SLO.tpot_s)


def test_a_long_wait_is_evidence_before_any_first_token() -> None:
    waiting = observed(oldest_wait_s=3.0, num_waiting=5)
    state, decision = LAW.step(PredictiveState(stepped_at_s=0.0), waiting, 1.0)
    assert state.prefill_shift < 0
    assert decision.reason is Reason.SLO_VIOLATED


def test_correction_is_slow_whatever_the_tick() -> None:
    state = LAW.initial()
    state, _ = LAW.step(state, observed(tpot_p90_s=1.0), 0.0)
    for tick in range(1, 4):
        state, _ = LAW.step(state, observed(tpot_p90_s=1.0), tick * 0.25)
    assert state.decode_shift == 0.0
    state, _ = LAW.step(state, observed(tpot_p90_s=1.0), 1.0)
    assert state.decode_shift < 0.0


def test_no_windup() -> None:
    """An hour beyond the limit is undone as fast as a moment beyond it."""
    steps_to_recover = []
    for num_violated in (5, 3600):
        state, now_s = LAW.initial(), 0.0
        for _ in range(num_violated):
            state, decision = LAW.step(state, observed(level_mean=5.0, decode_p90_s=0.1, tpot_p90_s=0.3), now_s)
            now_s += 1.0
        assert decision.decode.margin == pytest.approx(0.82)
        steps = 0
        while state.decode_shift < 0:
            state, _ = LAW.step(state, observed(level_mean=5.0, decode_p90_s=0.1, tpot_p90_s=0.01), now_s)
            now_s, steps = now_s + 1.0, steps + 1
        steps_to_recover.append(steps)
    assert steps_to_recover[0] == steps_to_recover[1]


def test_small_corrections_do_not_make_new_settings() -> None:
    """Margins move in hundredths, so that a slow drift is not a new version every second."""
    state, now_s, margins = LAW.initial(), 0.0, set()
    for _ in range(60):
        state, decision = LAW.step(state, observed(level_mean=5.0, decode_p90_s=0.1, tpot_p90_s=0.09), now_s)
        margins.add(decision.decode.margin)
        now_s += 1.0
    assert 1 < len(margins) <= 8


def test_a_restart_continues_the_margins() -> None:
    state = PredictiveState(prefill_shift=-0.05, decode_shift=0.03, stepped_at_s=0.0)
    _, in_force = LAW.step(state, observed(), 0.5)
    _, resumed = LAW.step(LAW.initial(in_force), observed(), 1000.0)
    assert (resumed.prefill, resumed.decode) == (in_force.prefill, in_force.decode)
    assert resumed.reason is Reason.RESTORED
