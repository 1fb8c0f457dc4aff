"""The table in shedding.py, and the drain rate behind it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.admission.estimates import OutputLength
from cluster.admission.shedding import Drain, judge
from controller.arbiter import ArbiterObservation, ArbiterReason, Rung

SLO_S = 1.0
ENGINES = ArbiterObservation(ttft_slo_s=SLO_S, ttft_level0_s=0.4, ttft_dimmed_s=0.1)


def draining(cost_per_s: float, seconds: int = 60) -> Drain:
    drain = Drain().note(0.0, True, 0.0)
    for step in range(1, 10 * seconds + 1):
        drain = drain.note(cost_per_s / 10, True, step / 10)
    return drain


@given(cost_per_s=st.floats(0.1, 1e5), cost=st.floats(0.1, 1e6))
def test_a_steady_drain_is_measured(cost_per_s: float, cost: float) -> None:
    assert draining(cost_per_s, seconds=1).wait_s(cost) == pytest.approx(cost / cost_per_s, rel=1e-6)


def test_time_without_a_queue_says_nothing_about_the_drain() -> None:
    drain = draining(100.0)
    idle = drain.note(0.0, False, 60.0).note(5.0, False, 500.0).note(0.0, True, 1000.0)
    assert idle.wait_s(100.0) == pytest.approx(drain.wait_s(100.0))
    assert Drain().note(0.0, True, 0.0).note(9.0, True, 0.1).wait_s(1.0) is None


def test_no_queue_or_no_knowledge_sheds_nobody() -> None:
    overloaded = ArbiterObservation(ttft_slo_s=SLO_S, ttft_level0_s=99.0, ttft_dimmed_s=99.0)
    assert judge(overloaded, 0.0, draining(1.0), SLO_S, 30.0) is None
    assert judge(overloaded, 1e6, Drain(), SLO_S, 30.0) is None


@pytest.mark.parametrize("waiting", [10.0, 80.0])
def test_a_queue_that_is_served_in_time_sheds_nobody(waiting: float) -> None:
    assert judge(ENGINES, waiting, draining(100.0), SLO_S, 30.0) is None


def test_a_longer_one_sheds_the_share_that_cannot_be_served() -> None:
    decision = judge(ENGINES, 390.0, draining(100.0), SLO_S, 30.0)
    assert decision is not None
    assert (decision.highest, decision.reason) == (Rung.SHED, ArbiterReason.AT_CAPACITY)
    assert decision.shed_frac == pytest.approx(1 - SLO_S / 4.0)  # 3.9 s here and 0.1 s in the engines
    assert decision.retry_after_s == pytest.approx(3.9)
    longer = judge(ENGINES, 800.0, draining(100.0), SLO_S, 30.0)
    assert longer is not None
    assert longer.shed_frac > decision.shed_frac


def test_while_replicas_come_nobody_is_shed_before_patience_ends() -> None:
    growing = ArbiterObservation(ttft_slo_s=SLO_S, ttft_level0_s=0.4, num_replicas=1, max_replicas=4)
    assert judge(growing, 390.0, draining(100.0), SLO_S, 30.0) is None
    impatient = judge(growing, 390.0, draining(100.0), SLO_S, 2.0)
    assert impatient is not None
    assert impatient.reason is ArbiterReason.PATIENCE_ENDS


def test_without_a_controller_the_queue_alone_decides() -> None:
    decision = judge(None, 200.0, draining(100.0), SLO_S, 30.0)
    assert decision is not None
    assert decision.shed_frac == pytest.approx(0.5)


def test_lengths_are_believed_once_seen() -> None:
    length = OutputLength()
    assert length.expect(900) == 900
    for _ in range(20):
        length = length.observe(30)
    assert length.expect(900) == pytest.approx(30)
    assert length.expect(10) == 10
