from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.step_time import TRIM_BOUNDS, StepTimeModel

COUNTS = (1, 4, 16, 64)
TIMES_S = st.floats(1e-4, 10.0)
PROFILES = st.lists(st.lists(TIMES_S, min_size=4, max_size=4), min_size=1, max_size=6)


@given(PROFILES, st.lists(st.integers(1, 200), min_size=2, max_size=6))
def test_deeper_is_never_slower_and_more_is_never_faster(measured_s: list[list[float]], sizes: list[int]) -> None:
    model = StepTimeModel.fit(COUNTS, measured_s)
    for shallow in range(model.num_levels):
        for deep in range(shallow, model.num_levels):
            assert model.times_s[deep] <= model.times_s[shallow]
            assert all(d <= s for d, s in zip(model.times_s[deep], model.times_s[shallow], strict=True))
        times_s = [model.predict_s(shallow, size) for size in sorted(sizes)]
        assert all(late >= early - 1e-9 for early, late in pairwise(times_s))


def test_a_monotone_profile_is_kept_and_a_dent_is_lifted() -> None:
    model = StepTimeModel.fit((1, 4, 16), [[1.0, 3.0, 2.0], [0.5, 4.0, 1.5]])
    assert model.times_s == ((1.0, 3.0, 3.0), (0.5, 3.0, 3.0))


def test_exact_at_the_grid_linear_between_and_beyond() -> None:
    model = StepTimeModel((2, 4, 10), ((1.0, 3.0, 6.0),))
    assert [model.predict_s(0, n) for n in (2, 4, 10)] == [1.0, 3.0, 6.0]
    assert model.predict_s(0, 3) == pytest.approx(2.0)
    assert model.predict_s(0, 8) == pytest.approx(5.0)
    assert model.predict_s(0, 1) == pytest.approx(0.0)
    assert model.predict_s(0, 20) == pytest.approx(11.0)


def test_one_measured_size_serves_all_sizes() -> None:
    model = StepTimeModel((8,), ((0.25,),), trim=2.0)
    assert [model.predict_s(0, n) for n in (1, 8, 500)] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.7, 2.9])
def test_trim_converges_to_a_constant_factor(factor: float) -> None:
    profile = model = StepTimeModel((1, 32), ((0.01, 0.1), (0.01, 0.05)))
    for step in range(200):
        level, num_tokens = step % 2, 1 + step % 32
        model = model.observe(level, num_tokens, factor * profile.predict_s(level, num_tokens))
    assert model.trim == pytest.approx(factor, rel=1e-3)
    assert model.predict_s(1, 32) == pytest.approx(factor * 0.05, rel=1e-3)


@given(st.lists(st.floats(0.0, 1e6), max_size=60))
def test_trim_is_bounded_and_one_stall_moves_it_little(measured_s: list[float]) -> None:
    model = StepTimeModel((1, 32), ((0.01, 0.1),))
    for step_s in measured_s:
        before = model.trim
        model = model.observe(0, 16, step_s)
        assert TRIM_BOUNDS[0] <= model.trim <= TRIM_BOUNDS[1]
        assert abs(model.trim - before) <= 0.05 * (TRIM_BOUNDS[1] - TRIM_BOUNDS[0]) + 1e-9
