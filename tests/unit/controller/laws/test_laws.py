"""What holds for every law: bounded, blind to missing data, back to zero, created by name with sane parameters only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.laws.base import LAWS, LawError, create_law
from controller.types import Decision, Observation, PhaseDecision, Reason
from tests.unit.controller.laws.observations import SLO, observations, observed

SAMPLED = ("aimd", "pi", "predictive")  # laws that react to what they observe


def run(law_name: str, seen: list[Observation], tick_s: float = 1.0, last: Decision | None = None) -> list[Decision]:
    law = create_law(law_name, SLO, {"level": 7} if law_name == "static" else None)
    state, decisions = law.initial(last), []
    for index, observation in enumerate(seen):
        state, decision = law.step(state, observation, index * tick_s)
        decisions.append(decision)
    return decisions


@pytest.mark.parametrize("law_name", LAWS)
@given(seen=st.lists(observations, min_size=1, max_size=40), tick_s=st.floats(0.01, 20))
def test_levels_stay_on_the_ladder(law_name: str, seen: list[Observation], tick_s: float) -> None:
    for observation, decision in zip(seen, run(law_name, seen, tick_s), strict=True):
        for phase, budget_s in ((decision.prefill, SLO.ttft_s), (decision.decode, SLO.tpot_s)):
            assert 0 <= phase.floor <= phase.ceiling <= observation.num_levels - 1
            assert phase.budget_s == budget_s
            assert 0 < phase.margin <= 1.1
        assert decision.law == law_name


@pytest.mark.parametrize("law_name", SAMPLED)
@given(seen=st.lists(observations, max_size=20))
def test_missing_data_never_dims_more(law_name: str, seen: list[Observation]) -> None:
    """After any history on one ladder, unknowns leave floors and margins where they were."""
    seen = [observation for observation in seen if observation.num_levels == 11]
    before, *unknown = run(law_name, [*seen, *[observed()] * 30], tick_s=6.0)[max(len(seen) - 1, 0) :]
    for decision in unknown:
        assert decision.prefill.floor <= before.prefill.floor and decision.decode.floor <= before.decode.floor
        if seen:
            assert decision.prefill.margin >= before.prefill.margin
            assert decision.decode.margin >= before.decode.margin


@pytest.mark.parametrize("law_name", SAMPLED)
@given(seen=st.lists(observations, max_size=20))
def test_calm_returns_to_zero(law_name: str, seen: list[Observation]) -> None:
    calm = observed(prefill_p90_s=0.01, decode_p90_s=0.01, ttft_p90_s=0.01, tpot_p90_s=0.01)
    fresh = run(law_name, [calm])[-1]
    settled = run(law_name, [*seen, *[calm] * 30], tick_s=6.0)[-1]
    assert settled.prefill == fresh.prefill
    assert settled.decode == fresh.decode
    assert settled.prefill.floor == settled.decode.floor == 0


@pytest.mark.parametrize("law_name", SAMPLED)
def test_worse_latency_never_dims_less(law_name: str) -> None:
    """Monotone: a run that sees a higher P90 everywhere ends with at least the floor and at most the margin."""
    last: Decision | None = None
    for p90_frac in (0.1, 0.5, 0.79, 0.81, 0.94, 0.96, 1.01, 1.5, 9.0):
        worse = observed(p90_frac, p90_frac / 10, level_mean=3.0, ttft_p90_s=p90_frac, tpot_p90_s=p90_frac / 10)
        decision = run(law_name, [worse] * 10, tick_s=6.0)[-1]
        if last is not None:
            assert decision.decode.floor >= last.decode.floor and decision.prefill.floor >= last.prefill.floor
            assert decision.decode.margin <= last.decode.margin and decision.prefill.margin <= last.prefill.margin
        last = decision


@pytest.mark.parametrize("law_name", LAWS)
def test_any_law_can_follow_any_other(law_name: str) -> None:
    pinned = PhaseDecision(floor=9, ceiling=9, budget_s=1.0, margin=1.0)
    last = Decision(pinned, pinned, "static", Reason.PINNED)
    decision = run(law_name, [observed(num_levels=4)], last=last)[0]
    assert decision.decode.ceiling <= 3


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("pid", {}, "allowed: predictive, pi, aimd, static"),
        ("aimd", {"speed": 1.0}, "no parameter 'speed'"),
        ("aimd", {"shrink_ratio": 1.5}, "shrink_ratio is 1.5"),
        ("aimd", {"check_interval_s": 0}, "check_interval_s is 0"),
        ("aimd", {"window_s": "long"}, "allowed: a number"),
        ("static", {"level": -1}, "level is -1"),
        ("static", {"level": 1.5}, "level is 1.5"),
        ("predictive", {"max_shift": 1.0}, "margin is"),
        ("predictive", {"relax_gain": -1.0}, "relax_gain is -1"),
    ],
)
def test_bad_parameters_are_one_sentence(name: str, params: dict[str, float], message: str) -> None:
    with pytest.raises(LawError, match=message) as caught:
        create_law(name, SLO, params)
    assert "\n" not in str(caught.value)
