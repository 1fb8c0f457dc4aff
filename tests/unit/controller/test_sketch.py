"""The sketch keeps its promise: every quantile within the relative error, whatever was merged in whatever order."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.sketch import RELATIVE_ERROR, QuantileSketch, SketchMismatchError

durations = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e4)), min_size=1, max_size=60)


@given(durations, st.floats(0, 1))
def test_quantile_is_within_the_relative_error(values: list[float], q: float) -> None:
    exact = sorted(values)[math.floor(q * (len(values) - 1))]
    estimate = QuantileSketch.of(values).quantile(q)
    assert estimate == pytest.approx(exact, rel=RELATIVE_ERROR * 1.0001)


@given(st.lists(durations, min_size=1, max_size=5))
def test_merging_equals_one_sketch_of_all_values(parts: list[list[float]]) -> None:
    merged = QuantileSketch.merged(QuantileSketch.of(part) for part in parts)
    whole = QuantileSketch.of([value for part in parts for value in part])
    assert (merged.counts, merged.zero_count) == (whole.counts, whole.zero_count)
    assert merged.total == pytest.approx(whole.total)
    assert merged.num_values == sum(map(len, parts))


def test_empty_has_no_quantile() -> None:
    assert QuantileSketch().quantile(0.9) is None
    assert QuantileSketch.merged([]).quantile(0.9) is None


def test_different_resolutions_do_not_merge() -> None:
    with pytest.raises(SketchMismatchError):
        QuantileSketch.merged([QuantileSketch.of([1.0]), QuantileSketch.of([1.0], relative_error=0.02)])


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_impossible_values_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        QuantileSketch.of([value])


@pytest.mark.parametrize("q", [-0.1, 1.1])
def test_quantile_must_be_a_share(q: float) -> None:
    with pytest.raises(ValueError, match="quantile"):
        QuantileSketch.of([1.0]).quantile(q)
