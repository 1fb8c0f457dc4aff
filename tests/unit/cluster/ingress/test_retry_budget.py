from __future__ import annotations

from cluster.ingress.retry_budget import CAPACITY, EARNED_PER_REQUEST, EARNED_PER_S, RetryBudget


def spend_all(budget: RetryBudget, now_s: float) -> int:
    count = 0
    while budget.spend(now_s):
        count += 1
    return count


def test_a_full_budget_carries_a_lost_replica() -> None:
    assert spend_all(RetryBudget(0.0), 0.0) == CAPACITY


def test_requests_and_time_earn_retries_up_to_the_capacity() -> None:
    budget = RetryBudget(0.0)
    spend_all(budget, 0.0)
    for _ in range(50):
        budget.earn(0.0)
    assert spend_all(budget, 0.0) == round(50 * EARNED_PER_REQUEST)
    assert spend_all(budget, 2.0) == 2 * EARNED_PER_S
    assert spend_all(budget, 10_000.0) == CAPACITY


def test_retries_stay_a_share_of_the_requests() -> None:
    """Every request of a second is lost: few are sent again."""
    budget = RetryBudget(0.0)
    spend_all(budget, 0.0)
    retried = 0
    for number in range(1000):
        budget.earn(number / 1000)
        retried += budget.spend(number / 1000)
    assert retried <= 1000 * EARNED_PER_REQUEST + EARNED_PER_S
