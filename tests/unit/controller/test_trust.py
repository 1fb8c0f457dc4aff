"""Trust: the table of trust.py, and that no replica is lost for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.trust import MOST, QUARANTINE, STRIKE, Trust


@pytest.mark.parametrize(
    ("before", "is_sound", "after"),
    [
        (Trust(), True, Trust()),
        (Trust(), False, Trust(STRIKE)),
        (Trust(STRIKE), True, Trust(STRIKE - 1)),
        (Trust(QUARANTINE - STRIKE), False, Trust(QUARANTINE, is_trusted=False)),
        (Trust(QUARANTINE - STRIKE - 1), False, Trust(QUARANTINE - 1)),
        (Trust(MOST, is_trusted=False), False, Trust(MOST, is_trusted=False)),
        (Trust(2, is_trusted=False), True, Trust(1, is_trusted=False)),
        (Trust(1, is_trusted=False), True, Trust(0)),
    ],
)
def test_truth_table(before: Trust, is_sound: bool, after: Trust) -> None:
    assert before.after(is_sound) == after


@given(st.lists(st.booleans()))
def test_bounded_and_redeemable(reports: list[bool]) -> None:
    trust = Trust()
    for is_sound in reports:
        trust = trust.after(is_sound)
        assert 0 <= trust.count <= MOST
    for _ in range(MOST):
        trust = trust.after(True)
    assert trust == Trust()


def test_a_fault_now_and_then_is_forgiven() -> None:
    trust = Trust()
    for number in range(1000):
        trust = trust.after(is_sound=number % 10 != 0)
        assert trust.is_trusted
