"""The quality budget: what is promised for any hour is kept, however the time is cut into steps."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.quality import (
    HOUR_S,
    MINUTE_S,
    SPEND_S,
    QualityAccount,
    QualityBudget,
    allowed_loss_nats,
    left_frac,
)

BUDGET = QualityBudget(mean_loss_nats=0.02, max_loss_nats=0.3)
WHOLE = HOUR_S * BUDGET.mean_loss_nats


@pytest.mark.parametrize(
    ("spent_frac", "allowed"),
    [(0.0, min(0.3, WHOLE / SPEND_S)), (0.5, 0.5 * WHOLE / SPEND_S), (1.0, 0.0), (1.5, 0.0)],
)
def test_truth_table(spent_frac: float, allowed: float) -> None:
    account = QualityAccount().spend(spent_frac * WHOLE, 0.0)
    assert allowed_loss_nats(BUDGET, account, 10.0) == pytest.approx(allowed)
    assert left_frac(BUDGET, account, 10.0) == pytest.approx(max(1 - spent_frac, 0.0))


def test_the_limit_holds_however_much_is_left() -> None:
    assert allowed_loss_nats(QualityBudget(1.0, 0.1), QualityAccount(), 0.0) == 0.1


def test_no_budget_no_loss() -> None:
    assert allowed_loss_nats(QualityBudget(0.0), QualityAccount(), 0.0) == 0.0
    assert left_frac(QualityBudget(0.0), QualityAccount(), 0.0) == 0.0


def test_a_lost_minute_comes_back_after_an_hour() -> None:
    account = QualityAccount().spend(WHOLE, 0.0)
    assert account.spent_nats_s(HOUR_S) == WHOLE
    assert account.spent_nats_s(HOUR_S + MINUTE_S) == 0.0
    assert account.spend(0.0, HOUR_S + MINUTE_S).minutes == ()


@settings(max_examples=30)
@given(
    st.floats(0.25, 20.0),
    st.lists(st.tuples(st.floats(0.0, 1.0), st.integers(1, 200)), min_size=1, max_size=20),
)
def test_no_hour_loses_more_than_its_budget(step_s: float, greed: list[tuple[float, int]]) -> None:
    """Whoever takes a share of what is allowed, step by step, never breaks the promise of any hour."""
    account, now_s, losses = QualityAccount(), 0.0, []
    for share, num_steps in greed:
        for _ in range(num_steps):
            loss = share * allowed_loss_nats(BUDGET, account, now_s)
            assert loss <= BUDGET.max_loss_nats
            now_s += step_s
            account = account.spend(loss * step_s, now_s)
            losses.append((now_s, loss * step_s))
    assert len(account.minutes) <= HOUR_S / MINUTE_S + 2
    for end_s, _ in losses[:: max(len(losses) // 20, 1)]:
        in_hour = sum(lost for at_s, lost in losses if end_s - HOUR_S < at_s <= end_s)
        assert in_hour <= WHOLE * (1 + 1e-9)
