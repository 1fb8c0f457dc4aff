"""The guard: its truth table, and what holds for every law and every history."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.guard import GuardParams, GuardState, guarded_step
from controller.laws.base import LAWS, create_law
from controller.quality import HOUR_S, QualityAccount, QualityBudget
from controller.types import Decision, Observation, PhaseDecision, PhaseObservation, QualitySpent, Reason, Slo

LOSSES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
SEEN = Observation(num_replicas=1, num_levels=6, ladder_measured=True, level_loss=LOSSES, evidence_age_s=0.0)
UNMEASURED = replace(SEEN, ladder_measured=False, level_loss=())
TIGHT = {"standard": QualityBudget(mean_loss_nats=1.0, max_loss_nats=0.06)}


class Wish:
    """A law that wants whatever it is told, in both phases."""

    window_s: float | None = None

    def __init__(self, floor: int, ceiling: int, name: str = "aimd") -> None:
        self.name = name
        self._phase = PhaseDecision(floor, ceiling, 0.1, 0.9)

    def initial(self, last: Decision | None = None) -> None:
        return None

    def step(self, state: None, observation: Observation, now_s: float) -> tuple[None, Decision]:
        top = observation.num_levels - 1
        phase = replace(self._phase, floor=min(self._phase.floor, top), ceiling=min(self._phase.ceiling, top))
        reason = Reason.PINNED if self.name == "static" else Reason.SLO_VIOLATED
        return None, Decision(phase, phase, self.name, reason)


def decide(
    law: Any, seen: Observation = SEEN, last: tuple[int, int] | None = None, now_s: float = 100.0, **params: Any
) -> tuple[int, int, Reason]:
    guard = GuardState()
    if last is not None:
        phase = PhaseDecision(*last, 0.1, 0.9)
        guard = GuardState(last=Decision(phase, phase, "aimd", Reason.SLO_MET), moved_at_s=now_s - 0.25)
    _, _, decision = guarded_step(GuardParams(**params), guard, law, law.initial(), seen, now_s)
    levels = [(phase.floor, phase.ceiling) for phase in (decision.prefill, decision.decode)]
    assert levels[0] == levels[1]
    return decision.decode.floor, decision.decode.ceiling, decision.reason


@pytest.mark.parametrize(
    ("law", "seen", "params", "expected"),
    [
        (Wish(3, 5), SEEN, {}, (3, 5, Reason.SLO_VIOLATED)),
        (Wish(3, 5), UNMEASURED, {}, (0, 0, Reason.UNMEASURED_LADDER)),
        (Wish(3, 5), UNMEASURED, {"allow_unmeasured": True}, (3, 5, Reason.SLO_VIOLATED)),
        (Wish(3, 5), UNMEASURED, {"allow_unmeasured": True, "budgets": TIGHT}, (0, 0, Reason.UNMEASURED_LADDER)),
        (Wish(3, 3, "static"), UNMEASURED, {}, (0, 0, Reason.UNMEASURED_LADDER)),
        (Wish(3, 5), replace(SEEN, evidence_age_s=10.5), {}, (0, 5, Reason.HOLD_ENDED)),
        (Wish(3, 5), replace(SEEN, evidence_age_s=9.5), {}, (3, 5, Reason.SLO_VIOLATED)),
        (Wish(0, 5), replace(SEEN, evidence_age_s=10.5), {}, (0, 5, Reason.SLO_VIOLATED)),
        (Wish(3, 3, "static"), replace(SEEN, evidence_age_s=10.5), {}, (3, 3, Reason.PINNED)),
        (Wish(4, 5), SEEN, {"budgets": TIGHT}, (3, 3, Reason.QUALITY_BUDGET)),
        (Wish(0, 3), SEEN, {"budgets": TIGHT}, (0, 3, Reason.SLO_VIOLATED)),
        (Wish(5, 5, "static"), SEEN, {"budgets": TIGHT}, (3, 3, Reason.QUALITY_BUDGET)),
    ],
)
def test_truth_table(law: Wish, seen: Observation, params: dict[str, Any], expected: tuple[int, int, Reason]) -> None:
    assert decide(law, seen, **params) == expected


@pytest.mark.parametrize(
    ("last", "law", "levels"),
    [
        ((0, 5), Wish(5, 5), (2, 5)),  # a floor rises step by step
        ((0, 5), Wish(0, 0), (0, 3)),  # a ceiling falls step by step
        ((0, 0), Wish(5, 5), (2, 2)),  # a pinned level moves step by step, and stays pinned
        ((5, 5), Wish(0, 0), (3, 3)),
        ((0, 0), Wish(0, 5), (0, 5)),  # more room forces nobody
        ((3, 3), Wish(0, 5), (0, 5)),
        ((0, 5), Wish(5, 5, "static"), (5, 5)),  # an order is obeyed at once
        ((5, 5), Wish(0, 0, "static"), (0, 0)),
    ],
)
def test_slew(last: tuple[int, int], law: Wish, levels: tuple[int, int]) -> None:
    assert decide(law, last=last)[:2] == levels


def test_one_slew_step_a_tick() -> None:
    guard, law, params = GuardState(last=decision_at(0)), Wish(5, 5), GuardParams()
    floors = []
    for now_s in (10.0, 10.01, 10.02, 10.25, 10.26, 10.5):
        guard, _, decision = guarded_step(params, guard, law, None, SEEN, now_s)
        floors.append(decision.decode.floor)
    assert floors == [2, 2, 2, 4, 4, 5]


def test_a_shorter_ladder_holds_at_once() -> None:
    assert decide(Wish(5, 5), replace(SEEN, num_levels=2), last=(5, 5))[:2] == (1, 1)


def test_off_stays_off_by_the_operators_reason() -> None:
    law = create_law("static", Slo(1.0, 0.1), {"level": 0})
    assert decide(law, UNMEASURED) == (0, 0, Reason.BROWNOUT_OFF)


def test_the_margin_of_a_forbidden_ladder_does_not_wind_down() -> None:
    law = create_law("predictive", Slo(1.0, 0.1))
    guard, state = GuardState(), law.initial()
    seen = replace(UNMEASURED, tpot_p90_s=9.0, decode=PhaseObservation(num_steps=9, num_tokens=9))
    for now_s in range(20):
        guard, state, decision = guarded_step(GuardParams(), guard, law, state, seen, float(now_s))
    assert decision.decode.margin == 0.92


def test_what_is_lost_is_charged_to_its_class() -> None:
    """Half of the tokens lose 0.2 nats: the class lost 0.1 for as long as the reports cover."""
    params = GuardParams(budgets={"standard": QualityBudget(1.0), "gold": QualityBudget(1.0)})
    spent = {"standard": QualitySpent(100, 10.0), "other": QualitySpent(7, 1.0)}
    seen = replace(SEEN, num_replicas=2, spent=spent, observed_s=20.0)
    guard, _, _ = guarded_step(params, GuardState(), Wish(0, 5), None, seen, 50.0)
    assert guard.accounts["standard"].spent_nats_s(50.0) == pytest.approx(0.1 * 10.0)
    assert guard.accounts["gold"] == QualityAccount()
    again, _, _ = guarded_step(params, guard, Wish(0, 5), None, seen, 51.0)
    assert again.accounts == guard.accounts, "nothing is charged twice"


def decision_at(level: int) -> Decision:
    phase = PhaseDecision(level, level, 0.1, 0.9)
    return Decision(phase, phase, "aimd", Reason.SLO_MET)


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[float, Observation]]:
    """Ticks with anything that telemetry may say, evidence missing included."""
    now_s, history = 0.0, []
    for _ in range(draw(st.integers(1, 60))):
        now_s += draw(st.sampled_from([0.05, 0.25, 0.25, 0.25, 1.0, 5.0]))
        p90_s = draw(st.none() | st.floats(0.001, 3.0))
        step_p90_s = draw(st.none() | st.floats(0.001, 3.0))
        phase = PhaseObservation(1, 1, step_p90_s, step_p90_s, level_mean=draw(st.floats(0, 5)))
        age_s = draw(st.sampled_from([0.0, 0.0, 0.0, 5.0, 30.0]))
        seen = replace(SEEN, ttft_p90_s=p90_s, tpot_p90_s=p90_s, prefill=phase, decode=phase, evidence_age_s=age_s)
        history.append((now_s, seen))
    return history


@settings(max_examples=60)
@given(st.sampled_from(LAWS), histories(), st.integers(1, 3))
def test_every_law_is_kept_within_the_rules(
    name: str, history: list[tuple[float, Observation]], slew_levels: int
) -> None:
    law = create_law(name, Slo(1.0, 0.1), {"level": 4} if name == "static" else None)
    params = GuardParams(budgets=TIGHT, slew_levels=slew_levels)
    guard, state, last = GuardState(), law.initial(), None
    for now_s, seen in history:
        guard, state, decision = guarded_step(params, guard, law, state, seen, now_s)
        phase = decision.decode
        assert 0 <= phase.floor <= phase.ceiling < seen.num_levels, "bounded"
        assert name == "static" or last is None or phase.floor <= last.floor + slew_levels
        assert name == "static" or last is None or phase.ceiling >= last.ceiling - slew_levels
        if last is None or name == "static":
            assert LOSSES[phase.ceiling] <= TIGHT["standard"].max_loss_nats
        is_dark = seen.evidence_age_s is not None and seen.evidence_age_s > params.hold_s
        if name != "static" and is_dark and last is not None:
            assert phase.floor <= last.floor, "missing data never dims more"
        last = phase


@settings(max_examples=30)
@given(st.sampled_from([name for name in LAWS if name != "static"]), st.integers(0, 5))
def test_without_evidence_every_floor_returns_to_zero(name: str, level: int) -> None:
    law = create_law(name, Slo(1.0, 0.1))
    guard, state = GuardState(last=decision_at(level)), law.initial(decision_at(level))
    for tick in range(10):
        guard, state, decision = guarded_step(
            GuardParams(), guard, law, state, replace(SEEN, evidence_age_s=11.0 + tick), 0.25 * tick
        )
    assert (decision.prefill.floor, decision.decode.floor) == (0, 0)


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30), st.floats(0.0, 0.1))
def test_the_hours_budget_is_kept(wishes: list[tuple[int, int]], mean_loss_nats: float) -> None:
    """Replicas run at the ceiling they are given, all the time, and the budget of the hour holds."""
    budget = QualityBudget(mean_loss_nats)
    params = GuardParams(budgets={"standard": budget}, slew_levels=5, tick_s=2.0)
    guard, seen, lost = GuardState(), SEEN, 0.0
    now_s, tick_s = 0.0, 10.0
    for floor, ceiling in wishes:
        for _ in range(6):
            law = Wish(min(floor, ceiling), ceiling)
            guard, _, decision = guarded_step(params, guard, law, None, seen, now_s)
            now_s += tick_s
            loss = LOSSES[decision.decode.ceiling]
            lost += loss * tick_s
            before = seen.spent.get("standard", QualitySpent())
            spent = {"standard": QualitySpent(before.num_tokens + 10, before.loss_nats + 10 * loss)}
            seen = replace(seen, spent=spent, observed_s=seen.observed_s + tick_s)
    assert lost <= HOUR_S * mean_loss_nats + max(LOSSES) * tick_s
