"""Fronts, levels and allocations."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.calibrate.candidates import StepSize, candidates, step_sizes, top_k_allocations
from engine.calibrate.frontier import align_levels, allocate, pareto_front
from engine.moe.ladder import Level
from engine.moe.settings import DimmerKind, DimSetting
from engine.types import Phase


def level(loss: float, step_frac: float) -> Level:
    return Level(DimSetting(DimmerKind.PIGGYBACK, keep=1, budget=round(loss * 1e4) + 1), loss, step_frac)


POINTS = st.lists(st.tuples(st.floats(-0.01, 0.5), st.floats(0.2, 1.1)), max_size=20)


@given(points=POINTS)
@settings(max_examples=100, deadline=None)
def test_a_front_has_no_point_that_another_beats(points: list[tuple[float, float]]) -> None:
    front = pareto_front([level(*point) for point in points])
    assert front[0] == Level(loss=0.0, step_frac=1.0)
    for milder, deeper in pairwise(front):
        assert (milder.loss or 0) <= (deeper.loss or 0)
        assert (milder.step_frac or 0) > (deeper.step_frac or 0)
    for loss, step_frac in points:
        assert any((f.loss or 0) <= max(loss, 0) and (f.step_frac or 0) <= step_frac + 0.01 for f in front)


def test_what_was_not_measured_is_not_on_the_front() -> None:
    assert len(pareto_front([Level(DimSetting(DimmerKind.TOPK, top_k=(1,)))])) == 1


@given(a=POINTS, b=POINTS, num_levels=st.integers(2, 12), max_loss=st.floats(0.01, 0.5))
@settings(max_examples=100, deadline=None)
def test_levels_are_as_many_everywhere_and_ordered(
    a: list[tuple[float, float]], b: list[tuple[float, float]], num_levels: int, max_loss: float
) -> None:
    fronts = {name: pareto_front([level(*p) for p in points]) for name, points in (("a", a), ("b", b))}
    chosen = align_levels(fronts, num_levels, max_loss)
    assert 1 <= len(chosen["a"]) == len(chosen["b"]) <= num_levels
    for name, levels in chosen.items():
        assert levels[0].setting.exact
        assert set(levels) <= set(fronts[name])
        assert all((x.loss or 0) <= max_loss * (1 + 1e-6) for x in levels)
        for milder, deeper in pairwise(levels):
            assert (milder.loss or 0) <= (deeper.loss or 0)
            assert (milder.step_frac or 1) >= (deeper.step_frac or 1)


def test_a_level_is_the_fastest_setting_within_one_budget_in_every_bucket() -> None:
    mild, middle, strong = level(0.01, 0.9), level(0.04, 0.8), level(0.3, 0.5)
    other = level(0.02, 0.7)
    fronts = {"small": pareto_front([mild, middle, strong]), "large": pareto_front([other])}
    chosen = align_levels(fronts, 4, max_loss=0.1)
    assert [x.loss for x in chosen["small"]] == [0.0, 0.01, 0.01, 0.04]
    assert [x.loss for x in chosen["large"]] == [0.0, 0.0, 0.02, 0.02]


@given(
    losses=st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=4), extra=st.integers(0, 8)
)
@settings(max_examples=80, deadline=None)
def test_the_knapsack_finds_the_best_allocation(losses: list[list[float]], extra: int) -> None:
    total = len(losses) + extra
    allocation = allocate(losses, total)
    assert sum(allocation) <= total
    best = min(
        sum(by_k[k - 1] for by_k, k in zip(losses, option, strict=True))
        for option in product((1, 2, 3), repeat=len(losses))
        if sum(option) <= total
    )
    assert sum(by_k[k - 1] for by_k, k in zip(losses, allocation, strict=True)) == pytest.approx(best)


def test_an_allocation_gives_every_layer_an_expert() -> None:
    with pytest.raises(ValueError, match="cannot give each of 3 layers one"):
        allocate([[0.1]] * 3, 2)


def test_allocations_keep_exempt_layers_whole() -> None:
    losses = [[0.3, 0.2, 0.1, 0.0], [0.03, 0.02, 0.01, 0.0]]
    found = top_k_allocations(losses, layers=(1, 2), num_layers=4, num_experts_per_token=4)
    assert all(top_k[0] == top_k[3] == 4 for top_k in found)
    assert found[0] == (4, 4, 3, 4)  # the least sensitive layer gives first
    assert all(sum(a) > sum(b) for a, b in pairwise(found))


def test_buckets_meet_half_way() -> None:
    sizes = step_sizes((128, 8, 32), (2048,))
    assert [(s.num_tokens, s.max_tokens) for s in sizes] == [(8, 16), (32, 64), (128, None), (2048, None)]
    assert sizes[-1].phase is Phase.PREFILL


def test_candidates_depend_on_the_size_and_on_what_is_loaded() -> None:
    kinds = (DimmerKind.UNITED, DimmerKind.PIGGYBACK, DimmerKind.TOPK)
    small = candidates(StepSize(Phase.DECODE, 8), (2, 4), 60, 4, [(3, 3)], kinds)
    large = candidates(StepSize(Phase.PREFILL, 2048), (), 60, 4, [(3, 3)], kinds)
    assert {s.kind for s in small} == set(kinds)
    assert {s.way for s in small} == {1, 2, 4}
    assert {s.kind for s in large} == {DimmerKind.TOPK}
    for setting in small + large:
        setting.check(num_layers=2, num_experts=60, num_experts_per_token=4)
