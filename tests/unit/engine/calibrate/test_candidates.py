"""Combinations are tried where two dimmers alone give hope, and nowhere else."""

from __future__ import annotations

from engine.calibrate.candidates import MAX_COMBINED, combinations
from engine.moe.ladder import Level
from engine.moe.settings import DimmerKind, DimSetting

UNITED = DimSetting(DimmerKind.UNITED, way=4, share=1.0)
TOP_3 = DimSetting(DimmerKind.TOPK, top_k=(3,))


def test_two_that_save_together_what_neither_does_alone() -> None:
    measured = [Level(UNITED, 0.02, 0.7), Level(TOP_3, 0.01, 0.9)]
    assert combinations(measured, max_loss=0.3) == [UNITED.with_top_k((3,))]


def test_not_beyond_the_loss_that_is_asked_for() -> None:
    assert combinations([Level(UNITED, 0.02, 0.7), Level(TOP_3, 0.01, 0.9)], max_loss=0.025) == []


def test_not_where_one_alone_is_faster_for_no_more_loss() -> None:
    stronger = Level(DimSetting(DimmerKind.UNITED, way=8, share=1.0), 0.025, 0.6)
    assert combinations([Level(UNITED, 0.02, 0.7), Level(TOP_3, 0.01, 0.9), stronger], max_loss=0.03) == []


def test_few_are_tried_the_largest_gain_first() -> None:
    mild, strong = DimSetting(DimmerKind.UNITED, way=2, share=0.5), UNITED
    measured = [Level(mild, 0.02, 0.98), Level(strong, 0.1, 0.5), Level(TOP_3, 0.01, 0.9)]
    assert combinations(measured, max_loss=0.3) == [strong.with_top_k((3,)), mild.with_top_k((3,))]  # 0.05, 0.018
    shares = [Level(DimSetting(DimmerKind.UNITED, way=4, share=b / 20), b / 500, 1 - b / 40) for b in range(1, 21)]
    assert len(combinations([*shares, Level(TOP_3, 0.001, 0.9)], max_loss=1.0)) == MAX_COMBINED


def test_what_cuts_nothing_or_was_not_measured_is_no_part() -> None:
    assert combinations([Level(UNITED, 0.02, 0.7)], max_loss=0.3) == []
    assert combinations([], max_loss=0.3) == []
