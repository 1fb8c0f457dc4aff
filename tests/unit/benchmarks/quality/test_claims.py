"""Verdicts follow from rows: truth tables on made-up figures."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.quality.claims import FAILS, HOLDS, NOT_RESOLVED, front, judge
from benchmarks.quality.generation import Continuations, compare_continuations, describe, repetition


def row(dimmer: str, experts: float, dnll: float, batch: int = 128, **more: Any) -> dict[str, Any]:
    share = more.pop("share", 1.0)
    filled = {"way": 1, "build": "", "se": 0.001, "kl": 0.0, "param": {"share": share}}
    return {"dimmer": dimmer, "experts": experts, "dnll": dnll, "batch": batch} | filled | more


def united(way: int, experts: float, dnll: float, build: str = "routed", **more: Any) -> dict[str, Any]:
    return row("united", experts, dnll, way=way, build=build, **more)


@pytest.mark.parametrize(
    ("mixture", "verdict"), [(0.30, HOLDS), (0.13, FAILS), (0.168, NOT_RESOLVED)]
)  # 60 % of it against 0.1
def test_c1(mixture: float, verdict: str) -> None:
    rows = [united(4, 15, 0.1), united(4, 15, mixture, "mixture")]
    assert judge(rows, [])["C1"]["verdict"] == verdict


def test_there_is_no_ratio_to_a_loss_that_is_not_resolved() -> None:
    rows = [united(4, 15, -0.001), united(4, 15, 0.0015, "mixture")]
    claim = judge(rows, [])["C1"]
    assert claim["verdict"] == NOT_RESOLVED and claim["figures"]["ratio"] is None
    assert judge([united(4, 15, 0.0), united(4, 15, 0.1, "mixture")], [])["C1"]["verdict"] == HOLDS


@pytest.mark.parametrize(("dnll", "seconds", "verdict"), [(0.15, 5, HOLDS), (0.15, 70, FAILS), (0.3, 5, FAILS)])
def test_c2(dnll: float, seconds: float, verdict: str) -> None:
    rows = [united(4, 15, 0.1), united(4, 15, dnll, "instant")]
    assert judge(rows, [{"name": "instant-4", "seconds": seconds}])["C2"]["verdict"] == verdict


@pytest.mark.parametrize(("two", "verdict"), [(0.04, HOLDS), (0.09, FAILS), (0.0665, NOT_RESOLVED)])
def test_c4_compares_at_equal_experts(two: float, verdict: str) -> None:
    rows = [row("exact", 60, 0.0), united(4, 15, 0.1), united(4, 40, 0.0437, share=0.5), united(2, 30, two)]
    assert judge(rows, [])["C4"]["verdict"] == verdict


def sweep(differences: dict[int, float]) -> list[dict[str, Any]]:
    rows = []
    for batch, difference in differences.items():
        rows += [row("exact", 60, 0.0, batch), united(4, 15, 0.1, batch=batch)]
        rows.append(row("piggyback", 37.5, 0.05 + difference, batch))
    return rows


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ({8: -0.02, 32: -0.01, 128: 0.02}, HOLDS),
        ({8: 0.02, 32: 0.01, 128: 0.02}, FAILS),
        ({8: -0.02, 32: 0.0, 128: 0.0}, NOT_RESOLVED),
        ({8: -0.02, 32: 0.02, 64: -0.02, 128: 0.02}, FAILS),
    ],
)
def test_c5(differences: dict[int, float], verdict: str) -> None:
    assert judge(sweep(differences), [])["C5"]["verdict"] == verdict


@pytest.mark.parametrize(("paper", "verdict"), [(0.10, HOLDS), (0.05, FAILS)])
def test_c6(paper: float, verdict: str) -> None:
    rows = [united(4, 15, 0.1), united(4, 45, 0.03, share=0.4)]
    rows.append(row("paper", 30, paper, way=4, build="routed", share=0.7))
    assert judge(rows, [])["C6"]["verdict"] == verdict


@pytest.mark.parametrize(("at_random", "verdict"), [(0.08, HOLDS), (0.0505, NOT_RESOLVED), (0.03, FAILS)])
def test_c6_against_a_random_hot_set(at_random: float, verdict: str) -> None:
    rows = [row("paper", experts, dnll, way=4, build="routed") for experts, dnll in ((15, 0.1), (45, 0.0))]
    rows.append(row("random mask", 30, at_random, way=4, build="routed"))
    assert judge(rows, [])["C6"]["verdict"] == verdict


def test_c13_and_missing_rows() -> None:
    assert judge([row("exact", 60, 0.0)], [])["C13"]["verdict"] == HOLDS
    assert judge([row("exact", 60, 0.01)], [])["C13"]["verdict"] == FAILS
    assert {claim["verdict"] for claim in judge([], []).values()} == {NOT_RESOLVED}


def test_c14() -> None:
    rows = [united(4, 15, dnll, f"routed-4-{name}") for name, dnll in (("apart", 0.1), ("similar", 0.13))]
    assert judge(rows, [])["C14"]["verdict"] == FAILS


def test_front_is_linear_between_rows() -> None:
    rows = [row("exact", 60, 0.0), united(4, 20, 0.08)]
    assert front(rows, 40) == (pytest.approx(0.04), 0.001)
    assert front(rows, 10) is None


def test_generated_text_is_described() -> None:
    looping, plain = [1, 2, 3, 4] * 5, list(range(20))
    assert repetition(plain) == 0.0
    assert repetition(looping) > 0.7
    assert describe(Continuations([looping, plain[:10]], 20))["ended_frac"] == 0.5
    figures = compare_continuations(Continuations([plain, [0, 1, 9]], 20), Continuations([plain, [0, 1, 2]], 20))
    assert figures == {"common_tokens": 11.0, "same_frac": 0.5}
