from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.config import BrownoutConfig, ConfigError
from engine.moe.ladder import Ladder, Level, load_ladder
from engine.moe.united import consecutive_groups

EXACT = {"way": 1, "share": 0, "loss": 0}


def write(path: Path, levels: list[dict[str, object]]) -> None:
    path.write_text(json.dumps({"levels": levels}))


def test_default_ladder_is_unmeasured_and_uses_the_loaded_ways_only(tmp_path: Path) -> None:
    ladder = load_ladder(BrownoutConfig(), (4,), tmp_path)
    assert not ladder.measured
    assert {level.way for level in ladder.levels} == {1, 4}


def test_a_ladder_beside_the_model_is_read(tmp_path: Path) -> None:
    write(tmp_path / "ladder.json", [{"way": 1, "share": 0, "loss": 0}, {"way": 2, "share": 0.5, "loss": 0.02}])
    ladder = load_ladder(BrownoutConfig(), (2,), tmp_path)
    assert ladder.measured
    assert ladder.levels[1] == Level(2, 0.5, 0.02)


@pytest.mark.parametrize(
    ("levels", "complaint"),
    [
        ([], "exact level"),
        ([{"way": 2, "share": 1}], "exact level"),
        ([EXACT, {"way": 2, "share": 1.5}], "share in"),
        ([EXACT, {"way": 2, "share": 1, "loss": 0.2}, {"way": 2, "share": 0.5, "loss": 0.1}], "ascending"),
        ([EXACT, {"way": 8, "share": 1}], "also needs"),
        ([{"wey": 1}], "cannot be read"),
    ],
)
def test_bad_ladders_are_refused_in_one_sentence(
    tmp_path: Path, levels: list[dict[str, object]], complaint: str
) -> None:
    write(tmp_path / "ladder.json", levels)
    with pytest.raises(ConfigError, match=complaint):
        load_ladder(BrownoutConfig(), (2, 4), tmp_path)


def test_a_named_ladder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_ladder(BrownoutConfig(ladder=str(tmp_path / "none.json")), (2,), tmp_path)


@pytest.mark.parametrize("way", [2, 4, 8])
def test_groups_are_balanced_and_complete(way: int) -> None:
    groups = consecutive_groups(60, way).groups
    assert [expert for group in groups for expert in group] == list(range(60))
    sizes = {len(group) for group in groups}
    assert max(sizes) <= way
    assert max(sizes) - min(sizes) <= 1


def test_a_ladder_is_named_for_people() -> None:
    assert [level.name for level in Ladder((Level(), Level(8, 0.5))).levels] == ["exact", "8-way b=0.5"]
