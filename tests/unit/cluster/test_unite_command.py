"""`brownoutserve unite` on a tiny checkpoint: what it writes, what it says, and its refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from cluster.cli import main
from engine.moe.united import UnitedArtefact
from tests.models import write_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"The lamp {n} burns low, and {n * n} moths come to it.\n" for n in range(1500)))
    return path


def run(model: Path, text: Path, *more: str) -> tuple[int, str]:
    common = ("unite", str(model), "--text", str(text), "--tokens", "32", "--steps", "2", "--device", "cpu")
    result = CliRunner().invoke(main, [*common, "--exempt-first", "1", "--exempt-last", "0", *more])
    return result.exit_code, result.output


def test_ways_are_built_and_a_second_run_finds_them(model: Path, text: Path) -> None:
    code, output = run(model, text, "--way", "2", "--way", "4")
    assert code == 0, output
    for way in (2, 4):
        artefact = UnitedArtefact(model / f"united-{way}")
        assert (artefact.way, sorted(artefact.manifest.layers)) == (way, [1, 2])
        artefact.check_weights()
    code, output = run(model, text, "--way", "2", "--way", "4")
    assert code == 0 and output.count("complete") == 2, output


def test_mistakes_end_in_one_sentence(model: Path, text: Path, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path))
    code, output = run(model, text, *out, "--sequences", "10")
    assert code == 2 and "at least 64 are needed" in output
    code, output = run(model, text, *out, "--method", "magic")
    assert code == 2 and "allowed: routed, instant" in output
    code, output = run(model, text, *out, "--exempt-first", "9")
    assert code == 2 and "exempt_first is 9" in output
    assert not any(tmp_path.iterdir())
