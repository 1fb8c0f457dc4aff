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
    for step in range(800):
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


@pytest.mark.parametrize("saving", [0.3, 0.5, 1.0])
def test_a_level_that_saves_less_than_profiled_is_found_out(saving: float) -> None:
    """Level 0 is as profiled; only what the deeper levels save is wrong. Afterwards every prediction is right."""
    profile = model = StepTimeModel((1, 32), ((0.01, 0.1), (0.01, 0.06), (0.01, 0.03)))
    truth = StepTimeModel((1, 32), profile.times_s, saving=saving)
    for step in range(3000):
        level = (step // 50) % 3
        model = model.observe(level, 32, truth.predict_s(level, 32))
    assert [model.predict_s(level, 32) for level in range(3)] == pytest.approx(
        [truth.predict_s(level, 32) for level in range(3)], rel=0.02
    )
    assert model.error_frac < 0.02


def test_exact_rows_bound_the_step() -> None:
    model = StepTimeModel((1, 32), ((0.01, 0.32), (0.01, 0.05)))
    assert model.predict_s(1, 32) == pytest.approx(0.05)
    assert model.predict_s(1, 32, num_exact=32) == pytest.approx(model.predict_s(0, 32))
    assert model.predict_s(1, 32, num_exact=16) == pytest.approx(model.predict_s(0, 16))
    assert model.predict_s(0, 32, num_exact=16) == pytest.approx(0.32)


@given(PROFILES, st.integers(1, 64), st.integers(0, 64), st.floats(0.1, 1.5))
def test_predictions_are_monotone_in_level_whatever_was_learnt(
    measured_s: list[list[float]], num_tokens: int, num_exact: int, saving: float
) -> None:
    fitted = StepTimeModel.fit(COUNTS, measured_s)
    model = StepTimeModel(fitted.token_counts, fitted.times_s, saving=saving)
    times_s = [model.predict_s(level, num_tokens, min(num_exact, num_tokens)) for level in range(model.num_levels)]
    assert all(deep <= shallow + 1e-9 for shallow, deep in pairwise(times_s))
