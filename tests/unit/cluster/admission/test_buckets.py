"""Buckets: never more than a minute's worth and the rate allows, nothing taken by halves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.admission.buckets import Levels, RateKind, Rates, full, refill, take, wait_s

RATES = st.builds(Rates, st.none() | st.floats(1, 1000), st.none() | st.floats(1, 10_000))
MOMENTS = st.lists(st.tuples(st.floats(0, 30), st.floats(0, 20_000)), max_size=60)


@given(rates=RATES, moments=MOMENTS)
def test_no_window_gives_more_than_a_full_bucket_and_the_rate(rates: Rates, moments: list[tuple[float, float]]) -> None:
    levels, elapsed_s, num_requests, num_tokens = full(rates), 0.0, 0, 0.0
    for pause_s, wanted in moments:
        elapsed_s += pause_s
        levels = refill(levels, rates, pause_s)
        grant = take(levels, rates, 1, wanted)
        if grant.short is not None:
            assert grant.levels == levels
            assert wait_s(levels, rates, 1, wanted) > 0
        else:
            num_requests, num_tokens = num_requests + 1, num_tokens + wanted
        levels = grant.levels
    for per_minute, used in ((rates.requests, num_requests), (rates.tokens, num_tokens)):
        if per_minute is not None:
            assert used <= per_minute * (1 + elapsed_s / 60) * (1 + 1e-9)


@given(rates=RATES, wanted=st.floats(0, 1000))
def test_after_the_wait_it_is_granted(rates: Rates, wanted: float) -> None:
    levels = take(full(rates), rates, (rates.requests or 0) * 0.99, (rates.tokens or 0) * 0.99, force=True).levels
    wanted = min(wanted, rates.tokens or wanted)
    later = refill(levels, rates, wait_s(levels, rates, 1, wanted) * (1 + 1e-9) + 1e-6)
    assert take(later, rates, 1, wanted).short is None


def test_what_was_not_used_comes_back_and_what_was_used_beyond_is_owed() -> None:
    rates = Rates(tokens=100)
    taken = take(full(rates), rates, 1, 80)
    assert taken.levels.tokens == 20
    assert take(taken.levels, rates, 0, -70, force=True).levels.tokens == 90
    owed = take(taken.levels, rates, 0, 50, force=True).levels
    assert owed.tokens == -30
    assert take(owed, rates, 1, 1).short is RateKind.TOKENS
    assert wait_s(owed, rates, 1, 1) == pytest.approx(31 / 100 * 60)
    assert take(full(rates), rates, 0, -1000, force=True).levels.tokens == 100


def test_parts_add_up() -> None:
    assert Rates(90, None).shared_by(3) == Rates(30, None)
    assert refill(Levels(5, 5), Rates(10, 10), -3.0) == Levels(5, 5)
