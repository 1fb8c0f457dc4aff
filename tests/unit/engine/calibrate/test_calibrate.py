"""A whole calibration of a tiny model: the command, its files, and going on where it stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cluster.cli import main
from engine.calibrate.profile import PROFILE_FILE, QualityProfile, read_profile
from engine.config import BrownoutConfig, CacheConfig, ConfigError, EngineConfig, ModelConfig
from engine.moe.ladder import Ladder, Level, Provenance, read_ladder
from engine.moe.settings import DimmerKind, DimSetting
from engine.moe.united import UnitedArtefact
from engine.pool.slots import load_slot
from engine.types import Phase
from engine.weights.digest import model_digest
from tests.models import PROJECT_ROOT, write_checkpoint
from tests.united import write_united


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_checkpoint(tmp_path_factory.mktemp("model"))
    write_united(directory / "united-4", directory, 4)
    return directory


def run(model: Path, *options: str) -> Result:
    text = str(PROJECT_ROOT / "README.md")
    command = ["calibrate", str(model), "--text", text, "--sequences", "64", "--tokens", "8", "--device", "cpu"]
    sizes = ["--decode", "2", "--decode", "16", "--prefill", "64", "--repeats", "1"]
    return CliRunner().invoke(main, [*command, *sizes, "--exempt-first", "1", "--exempt-last", "0", *options])


@pytest.fixture(scope="module")
def calibrated(model: Path) -> Path:
    result = run(model)
    assert result.exit_code == 0, result.output
    return model


def test_the_ladder_is_ordered_and_the_engine_takes_it(calibrated: Path) -> None:
    ladder = read_ladder(calibrated / "ladder.json")
    assert [(b.phase, b.max_tokens) for b in ladder.buckets] == [
        (Phase.DECODE, 6), (Phase.DECODE, None), (Phase.PREFILL, None),
    ]  # fmt: skip
    assert ladder.measured
    assert ladder.provenance is not None and set(ladder.provenance.united) == {4}
    slot = load_slot(served(calibrated))
    assert slot.ladder == ladder
    assert list(ladder.losses) == sorted(ladder.losses)


def served(model: Path, allow_unmeasured: bool = False) -> EngineConfig:
    brownout = BrownoutConfig(united="united-4", exempt_first=1, exempt_last=0, allow_unmeasured=allow_unmeasured)
    return EngineConfig(ModelConfig(str(model)), CacheConfig(num_blocks=9), brownout=brownout, device="cpu")


def test_everything_that_was_measured_is_in_the_profile(calibrated: Path) -> None:
    profile = read_profile(calibrated / PROFILE_FILE)
    assert set(profile.rows) == {"decode 2", "decode 16", "prefill 64"}
    assert {row.setting.kind.name for row in profile.rows["decode 2"].values()} == {"UNITED", "PIGGYBACK", "TOPK"}
    assert all(row.step_frac is not None for rows in profile.rows.values() for row in rows.values())
    assert len(profile.sensitivity) == 2 * 3  # layers that may be dimmed, experts left
    assert (calibrated / "ladder.png").stat().st_size > 1000


def test_it_goes_on_where_it_stopped(calibrated: Path) -> None:
    path = calibrated / PROFILE_FILE
    before = read_profile(path)
    rows = dict(before.rows["decode 16"])
    removed = rows.pop(next(iter(rows)))
    marked = {setting: replace(row, kl=-1.0) for setting, row in rows.items()}
    QualityProfile(before.key, before.sensitivity, before.rows | {"decode 16": marked}).write(path)
    assert run(calibrated).exit_code == 0
    after = read_profile(path).rows["decode 16"]
    assert after[removed.setting].loss == pytest.approx(removed.loss, abs=1e-6)
    assert all(after[setting].kl == -1.0 for setting in marked)
    before.write(path)


def test_another_text_starts_anew(calibrated: Path, tmp_path: Path) -> None:
    content = json.loads((calibrated / PROFILE_FILE).read_text())
    assert not QualityProfile.open(calibrated / PROFILE_FILE, content["key"] | {"text_digest": "other"}).rows
    assert QualityProfile.open(calibrated / PROFILE_FILE, content["key"]).rows
    (tmp_path / "broken.json").write_text("{")
    assert not QualityProfile.open(tmp_path / "broken.json", content["key"]).rows


def test_too_little_text_is_refused(model: Path, tmp_path: Path) -> None:
    result = run(model, "--tokens", "512")
    assert result.exit_code == 2
    assert "at least 64 are needed" in result.output
    result = run(model, "--decode", "65", "--dimmer", "united", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "a decode 65 step takes 65 sequences" in result.output


def test_a_ladder_of_another_build_counts_as_unmeasured(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    built_for = UnitedArtefact(write_united(model / "united-4", model, 4)).digest
    levels = (Level(loss=0.0), Level(DimSetting(DimmerKind.UNITED, way=4, share=1.0), loss=0.1))
    buckets = Ladder.uniform(levels).buckets
    Ladder(buckets, Provenance(model_digest(model), {4: built_for})).write(model / "ladder.json")
    assert load_slot(served(model)).ladder.measured
    write_united(model / "united-4", model, 4, seed=1)
    with pytest.raises(ConfigError, match="was measured with other united experts"):
        load_slot(served(model))
    assert not load_slot(served(model, allow_unmeasured=True)).ladder.measured


def test_a_ladder_of_another_model_is_refused(calibrated: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", seed=1)
    write_united(other / "united-4", other, 4)
    (other / "ladder.json").write_bytes((calibrated / "ladder.json").read_bytes())
    with pytest.raises(ConfigError, match="was measured on the model"):
        load_slot(served(other))
