"""Arrival times: reproducible, in order, and of the rate that was asked for."""

import numpy as np
import pytest

from benchmarks.workloads.arrivals import RatePhase, draw_times

PHASES = (RatePhase(100, 5), RatePhase(50, 40), RatePhase(100, 5))


def test_equal_seeds_give_equal_times_and_others_do_not():
    assert draw_times(PHASES, seed=3) == draw_times(PHASES, seed=3)
    assert draw_times(PHASES, seed=3) != draw_times(PHASES, seed=4)


def test_times_ascend_and_stay_inside_the_phases():
    times_s = draw_times(PHASES, seed=0)
    assert times_s == sorted(times_s)
    assert all(0 <= t < 250 for t in times_s)


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0])
def test_each_phase_has_its_rate(cv):
    times_s = np.array(draw_times(PHASES, seed=1, cv=cv))
    counts = np.histogram(times_s, bins=[0, 100, 150, 250])[0]
    for count, expected in zip(counts, (500, 2000, 500), strict=True):
        assert abs(count - expected) < 4 * cv * expected**0.5  # four standard deviations of a renewal count


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0])
def test_gaps_vary_as_asked(cv):
    gaps_s = np.diff(draw_times((RatePhase(1000, 20),), seed=2, cv=cv))
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.05)


def test_changing_one_phase_leaves_the_others_alone():
    before = draw_times(PHASES, seed=5)
    after = draw_times((PHASES[0], RatePhase(50, 10), PHASES[2]), seed=5)
    assert [t for t in before if t < 100] == [t for t in after if t < 100]
    assert [t for t in before if t >= 150] == [t for t in after if t >= 150]


def test_impossible_phases_are_refused():
    with pytest.raises(ValueError, match="must be positive"):
        RatePhase(0, 5)
    with pytest.raises(ValueError, match="must be positive"):
        RatePhase(5, 0)
