"""The arbiter's truth table row by row, then what must hold for every load."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.arbiter import MAX_SHED_FRAC, ArbiterObservation, ArbiterReason, Rung, arbitrate

ORDER = list(Rung)


def seen(level0_s: float | None, **fields: Any) -> ArbiterObservation:
    return ArbiterObservation(ttft_slo_s=1.0, ttft_level0_s=level0_s, **fields)


@pytest.mark.parametrize(
    ("observation", "rungs", "reason"),
    [
        pytest.param(seen(None), (), ArbiterReason.NO_DATA, id="unknown"),
        pytest.param(seen(0.9, ttft_dimmed_s=0.5), (), ArbiterReason.KEPT, id="kept"),
        pytest.param(seen(1.5, ttft_dimmed_s=0.9), (Rung.DIM,), ArbiterReason.DIMMING_CARRIES, id="dim"),
        pytest.param(
            seen(3.0, ttft_dimmed_s=1.5, ttft_switched_s=0.8),
            (Rung.DIM, Rung.SWITCH),
            ArbiterReason.TURN_CARRIES,
            id="switch",
        ),
        pytest.param(
            seen(3.0, ttft_dimmed_s=1.5, ttft_first_s=0.8),
            (Rung.DIM, Rung.QUEUE),
            ArbiterReason.ORDER_CARRIES,
            id="no-other-model-order",
        ),
        pytest.param(
            seen(3.0, ttft_dimmed_s=3.0, ttft_first_s=0.8),
            (Rung.QUEUE,),
            ArbiterReason.ORDER_CARRIES,
            id="useless-dimming-is-skipped",
        ),
        pytest.param(
            seen(4.0, ttft_dimmed_s=2.0, max_replicas=2),
            (Rung.DIM, Rung.SCALE),
            ArbiterReason.CAPACITY_COMES,
            id="scale",
        ),
        pytest.param(
            seen(4.0, ttft_dimmed_s=2.0, num_starting=1),
            (Rung.DIM, Rung.SCALE),
            ArbiterReason.CAPACITY_COMES,
            id="a-replica-is-starting",
        ),
        pytest.param(
            seen(9.0, ttft_dimmed_s=5.0, max_replicas=2, patience_s=4.0),
            (Rung.DIM, Rung.SCALE, Rung.SHED),
            ArbiterReason.PATIENCE_ENDS,
            id="patience",
        ),
        pytest.param(
            seen(9.0, ttft_dimmed_s=5.0), (Rung.DIM, Rung.SHED), ArbiterReason.AT_CAPACITY, id="nothing-to-come"
        ),
        pytest.param(
            seen(1.5, ttft_dimmed_s=0.9, num_desired=3, max_replicas=4),
            (Rung.DIM, Rung.SCALE),
            ArbiterReason.DIMMING_CARRIES,
            id="dimming-bridges-the-wait",
        ),
    ],
)
def test_truth_table(observation: ArbiterObservation, rungs: tuple[Rung, ...], reason: ArbiterReason) -> None:
    decision = arbitrate(observation)
    assert decision.rungs == rungs
    assert decision.reason is reason
    assert (decision.shed_frac > 0) == (Rung.SHED in rungs)


def test_what_is_shed_makes_the_rest_fit() -> None:
    decision = arbitrate(seen(9.0, ttft_dimmed_s=4.0, drain_s=2.0))
    assert decision.shed_frac == pytest.approx(0.75)
    assert decision.retry_after_s == pytest.approx(3.0)


waits_s = st.one_of(st.none(), st.floats(0.001, 100))


@given(level0_s=st.floats(0.001, 100), dimmed_s=waits_s, switched_s=waits_s, first_s=waits_s, room=st.integers(0, 3))
def test_mildest_first_and_never_more_than_needed(
    level0_s: float, dimmed_s: float | None, switched_s: float | None, first_s: float | None, room: int
) -> None:
    observation = seen(
        level0_s, ttft_dimmed_s=dimmed_s, ttft_switched_s=switched_s, ttft_first_s=first_s, max_replicas=1 + room
    )
    decision = arbitrate(observation)
    assert list(decision.rungs) == sorted(decision.rungs, key=ORDER.index)
    assert 0 <= decision.shed_frac <= MAX_SHED_FRAC
    best_s = min(s for s in (level0_s, dimmed_s, switched_s, first_s) if s is not None)
    if best_s <= observation.ttft_slo_s:
        assert not {Rung.SCALE, Rung.SHED} & set(decision.rungs)
    if level0_s <= observation.ttft_slo_s:
        assert decision.rungs == ()
