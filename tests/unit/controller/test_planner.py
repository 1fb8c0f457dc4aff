"""The planner's truth table row by row, then what must hold for every load."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.planner import FleetObservation, PlanDecision, Planner, PlannerParams, PlannerState, PlanReason
from controller.types import Slo

SLO = Slo(ttft_s=1.0, tpot_s=0.1)
PARAMS = PlannerParams(max_replicas=10, down_after_s=60.0, cold_start_s=30.0)
PLANNER = Planner(SLO, PARAMS)


def fleet(num_ready: int, each: int, **fields: Any) -> FleetObservation:
    """``num_ready`` replicas with ``each`` of 32 places taken; a step takes 20 ms and 1 ms for each request."""
    step_s = 0.02 + 0.001 * each
    known: dict[str, Any] = {
        "num_running": num_ready * each,
        "step_s": step_s,
        "step_level0_s": step_s,
        "full_step_level0_s": 0.052,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 256,
    }
    return FleetObservation(num_ready=num_ready, **{**known, **fields})


def plan(
    seen: FleetObservation, seconds: float = 0.0, state: PlannerState | None = None
) -> tuple[PlannerState, PlanDecision]:
    """The same observation once a second, for ``seconds``."""
    state = state or PLANNER.initial()
    start_s = state.stepped_at_s
    for second in range(round(seconds) + 1):
        state, decision = PLANNER.step(state, seen, start_s + second)
    return state, decision


@pytest.mark.parametrize(
    ("seen", "seconds", "desired", "reason"),
    [
        pytest.param(FleetObservation(0), 0, 1, PlanReason.NO_DATA, id="nobody-reports"),
        pytest.param(FleetObservation(3, num_starting=1), 600, 4, PlanReason.NO_DATA, id="no-step-no-opinion"),
        pytest.param(fleet(2, 20), 0, 2, PlanReason.STEADY, id="steady"),
        pytest.param(fleet(2, 32), 0, 3, PlanReason.OVERLOAD, id="full-batches"),
        pytest.param(fleet(2, 26, num_waiting=40), 0, 4, PlanReason.OVERLOAD, id="a-queue-counts"),
        pytest.param(fleet(2, 32, num_starting=1), 0, 3, PlanReason.STEADY, id="asked-for-already"),
        pytest.param(fleet(9, 32, num_waiting=900), 0, 10, PlanReason.AT_MAX, id="limit"),
        pytest.param(fleet(4, 4), 30, 4, PlanReason.SETTLING, id="not-for-long-enough"),
        pytest.param(fleet(4, 4), 70, 2, PlanReason.CONSOLIDATE, id="consolidate"),
        pytest.param(fleet(2, 12), 600, 2, PlanReason.STEADY, id="one-alone-would-be-too-full"),
        pytest.param(fleet(4, 4, level_mean=0.5), 600, 4, PlanReason.DIMMED, id="dimmed-never-shrinks"),
    ],
)
def test_truth_table(seen: FleetObservation, seconds: float, desired: int, reason: PlanReason) -> None:
    _, decision = plan(seen, seconds)
    assert (decision.desired, decision.reason) == (desired, reason)


def test_dimming_does_not_hide_the_need() -> None:
    """Two replicas that dim to half the step time look half empty; at level 0 they would overflow."""
    undimmed = fleet(2, 20)
    dimmed = replace(undimmed, step_s=0.5 * (undimmed.step_s or 0.0), level_mean=3.0)
    assert plan(undimmed)[1].desired == 2
    assert plan(dimmed)[1].desired > 2
    assert plan(dimmed)[1].reason is PlanReason.OVERLOAD


def test_a_ramp_is_met_one_cold_start_ahead() -> None:
    state = PLANNER.initial()
    reasons = []
    for second in range(40):
        state, decision = PLANNER.step(state, fleet(2, 10 + second // 3), float(second))
        reasons.append(decision.reason)
        if decision.desired > 2:
            break
    assert reasons[-1] is PlanReason.COLD_START


def test_a_measured_cold_start_replaces_the_prior() -> None:
    state, decision = plan(fleet(2, 20))
    assert decision.cold_start_s == PARAMS.cold_start_s
    state, decision = plan(fleet(2, 20, cold_start_s=95.0), state=state)
    assert decision.cold_start_s == 95.0
    assert plan(fleet(2, 20), state=state)[1].cold_start_s == 95.0


def test_a_short_lull_starts_the_wait_anew() -> None:
    state, _ = plan(fleet(4, 4), 50)
    state, decision = plan(fleet(4, 26), 30, state)
    assert decision.reason is not PlanReason.CONSOLIDATE
    _, decision = plan(fleet(4, 4), 5, state)
    assert decision.desired == 4


loads = st.builds(
    fleet,
    num_ready=st.integers(1, 10),
    each=st.integers(0, 32),
    num_waiting=st.integers(0, 500),
    queued_prefill_tokens=st.integers(0, 100_000),
    level_mean=st.floats(0, 6),
    num_starting=st.integers(0, 3),
)


@given(seen=st.lists(loads, min_size=1, max_size=20))
def test_always_within_the_limits(seen: list[FleetObservation]) -> None:
    state = PLANNER.initial()
    for second, observation in enumerate(seen):
        state, decision = PLANNER.step(state, observation, float(second))
        assert PARAMS.min_replicas <= decision.desired <= PARAMS.max_replicas


@given(seen=loads, more=st.integers(1, 200))
def test_more_load_never_needs_less(seen: FleetObservation, more: int) -> None:
    busier = replace(seen, num_waiting=seen.num_waiting + more)
    assert plan(busier)[1].needed_now >= plan(seen)[1].needed_now


@given(seen=loads)
def test_what_is_needed_now_holds_the_load(seen: FleetObservation) -> None:
    """The fixed point: as many replicas as it says would not ask for more."""
    needed = plan(seen)[1].needed_now
    if needed <= PARAMS.max_replicas:
        at_size = replace(seen, num_starting=max(0, needed - seen.num_ready))
        assert plan(at_size)[1].desired <= max(needed, seen.num_ready + at_size.num_starting)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"min_replicas": 3, "max_replicas": 2}, "1 <= min <= max"),
        ({"target_frac": 0.0}, "target_frac is 0.0"),
        ({"down_after_s": -1.0}, "down_after_s is -1.0"),
        ({"max_growth": 0.5}, "max_growth is 0.5"),
    ],
)
def test_bad_params_are_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlannerParams(**params)
