from __future__ import annotations

import pytest

from cluster.router.arrivals import ArrivalRate


def test_it_approaches_the_true_rate_and_forgets_it() -> None:
    rate = ArrivalRate(memory_s=3.0)
    assert rate.update(100, 0.0) == 0.0
    for tenth in range(1, 301):
        seen = rate.update(100 + 2 * tenth, tenth / 10)
    assert seen == pytest.approx(20.0, rel=0.01)
    assert rate.update(700, 33.0) == pytest.approx(20.0 / 2.718, rel=0.01)
    assert rate.update(700, 33.0) == rate.update(700, 33.0)  # no time has passed


def test_it_does_not_depend_on_how_often_it_is_asked() -> None:
    often, seldom = ArrivalRate(3.0), ArrivalRate(3.0)
    for counter in (often, seldom):
        counter.update(0, 0.0)
    for step in range(1, 11):
        often.update(3 * step, step / 10)
    assert often.update(30, 1.0) == pytest.approx(seldom.update(30, 1.0))
