"""The ladder's file, its order, and what a level means at each step size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.config import ConfigError
from engine.moe.ladder import Bucket, Ladder, Level, Provenance, default_ladder, read_ladder
from engine.moe.settings import DimmerKind, DimSetting
from engine.moe.united import consecutive_groups
from engine.types import Levels, Phase

EXACT = {"way": 1, "share": 0, "loss": 0}
TWO_WAY = DimSetting(DimmerKind.UNITED, way=2, share=0.5)
FOUR_WAY = DimSetting(DimmerKind.UNITED, way=4, share=1.0)
PIGGYBACK = DimSetting(DimmerKind.PIGGYBACK, keep=2)
TOP_3 = DimSetting(DimmerKind.TOPK, top_k=(3, 4))


def bucketed() -> Ladder:
    """Small decode steps piggyback, larger ones unite, prompts use fewer experts."""
    exact = Level(loss=0.0, step_frac=1.0)
    return Ladder(
        (
            Bucket(Phase.DECODE, 16, (exact, Level(PIGGYBACK, 0.01, 0.8), Level(PIGGYBACK, 0.01, 0.8))),
            Bucket(Phase.DECODE, None, (exact, Level(TWO_WAY, 0.012, 0.9), Level(FOUR_WAY, 0.08, 0.6))),
            Bucket(Phase.PREFILL, None, (exact, Level(loss=0.0, step_frac=1.0), Level(TOP_3, 0.03, 0.9))),
        ),
        Provenance("model", {2: "two", 4: "four"}, {"tokens": 5}),
    )


def test_a_level_means_another_setting_at_another_size() -> None:
    ladder = bucketed()
    small, large = (ladder.resolve(Levels(prefill=2, decode=1), n) for n in (16, 17))
    assert [ladder.settings[i] for i in (small.prefill, small.decode)] == [TOP_3, PIGGYBACK]
    assert [ladder.settings[i] for i in (large.prefill, large.decode)] == [TOP_3, TWO_WAY]
    assert ladder.resolve(Levels(0, 0), 5) == Levels(0, 0)
    assert ladder.resolve(Levels(1, 0), 5) == Levels(0, 0)  # nothing gains so little for prompts


def test_a_ladder_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "ladder.json"
    bucketed().write(path)
    assert read_ladder(path) == bucketed()


def test_its_losses_are_the_worst_of_any_bucket() -> None:
    assert bucketed().losses == (0.0, 0.012, 0.08)
    assert bucketed().without_losses().losses == ()
    assert not bucketed().without_losses().measured


def test_it_knows_the_ways_that_it_needs() -> None:
    assert bucketed().ways == {2, 4}
    assert Ladder.exact().ways == frozenset()


def test_levels_are_named_for_people() -> None:
    assert bucketed().names == (
        "exact",
        "piggyback k0=2 | 2-way b=0.5 | exact",
        "piggyback k0=2 | 4-way b=1 | top-3.5",
    )
    assert TWO_WAY.with_top_k((3,)).name == "2-way b=0.5 top-3"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (DimmerKind.UNITED, ["exact", "4-way b=0.85", "4-way b=1"]),
        (DimmerKind.PAPER, ["exact", "paper 4-way p=0.15", "paper 4-way p=0"]),
        (DimmerKind.PIGGYBACK, ["exact", "piggyback k0=3", "piggyback k0=2", "piggyback k0=1"]),
        (DimmerKind.TOPK, ["exact", "top-3", "top-2", "top-1"]),
    ],
)
def test_default_ladders_are_unmeasured_and_use_the_loaded_ways_only(kind: DimmerKind, expected: list[str]) -> None:
    ladder = default_ladder(kind, (4,), 4)
    assert not ladder.measured
    assert list(ladder.names) == expected


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_a_plain_list_of_levels_is_a_ladder(tmp_path: Path) -> None:
    levels = [EXACT, {"way": 2, "share": 0.5, "loss": 0.02}, {"dimmer": "topk", "top_k": 3, "loss": 0.02}]
    ladder = read_ladder(write(tmp_path / "ladder.json", {"levels": levels}))
    assert ladder.measured
    assert ladder.settings == (DimSetting(), TWO_WAY, DimSetting(DimmerKind.TOPK, top_k=(3,)))


@pytest.mark.parametrize(
    ("levels", "complaint"),
    [
        ([], "exact level"),
        ([{"way": 2, "share": 1}], "exact level"),
        ([EXACT, {"way": 2, "share": 1.5}], "share in"),
        ([EXACT, {"way": 2, "share": 1, "loss": 0.2}, {"way": 2, "share": 0.5, "loss": 0.1}], "ascending"),
        ([EXACT, {"dimmer": "piggyback"}], "keep 0"),
        ([EXACT, {"dimmer": "topk"}], "no top_k"),
        ([EXACT, {"dimmer": "dark"}], "dimmer 'dark'; allowed: exact, united"),
        ([{"wey": 1}], "cannot be read"),
    ],
)
def test_bad_levels_are_refused_in_one_sentence(
    tmp_path: Path, levels: list[dict[str, object]], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_ladder(write(tmp_path / "ladder.json", {"levels": levels}))


@pytest.mark.parametrize(
    ("buckets", "complaint"),
    [
        ([("decode", None, 2)], "sizes \\[\\] for prefill"),
        ([("prefill", None, 2), ("decode", 16, 2)], r"sizes \[16\] for decode"),
        ([("prefill", None, 2), ("decode", 64, 2), ("decode", 16, 2), ("decode", None, 2)], "ascending, the last null"),
        ([("prefill", None, 2), ("decode", None, 1)], "as many in every bucket"),
    ],
)
def test_bad_buckets_are_refused(tmp_path: Path, buckets: list[tuple[str, int | None, int]], complaint: str) -> None:
    levels = [{"dimmer": "exact"}, {"dimmer": "topk", "top_k": 3}]
    rows = [{"phase": phase, "max_tokens": size, "levels": levels[:count]} for phase, size, count in buckets]
    content = {"format": "brownoutserve-ladder-1", "provenance": None, "buckets": rows}
    with pytest.raises(ConfigError, match=complaint):
        read_ladder(write(tmp_path / "ladder.json", content))


@pytest.mark.parametrize("way", [2, 4, 8])
def test_groups_are_balanced_and_complete(way: int) -> None:
    groups = consecutive_groups(60, way).groups
    assert [expert for group in groups for expert in group] == list(range(60))
    sizes = {len(group) for group in groups}
    assert max(sizes) <= way
    assert max(sizes) - min(sizes) <= 1
