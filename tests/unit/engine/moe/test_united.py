"""Artefacts of united experts: what was written comes back, and what does not fit is refused in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.config import BrownoutConfig, CacheConfig, ConfigError, EngineConfig, ModelConfig
from engine.moe.united import ArtefactError, UnitedArtefact, layer_file, read_manifest, write_layer
from engine.pool.slots import load_slot
from tests.models import write_config
from tests.united import change_manifest, write_united


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def built(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_united(tmp_path_factory.mktemp("united") / "4-way", model, 4, random_seed=0)


@pytest.fixture
def artefact(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "united"))


def config(model: Path, *united: Path, ways: tuple[int, ...] = ()) -> EngineConfig:
    paths = tuple(map(str, united))
    brownout = BrownoutConfig(ways, paths, exempt_first=1, exempt_last=1, allow_unmeasured=True, profile_repeats=0)
    return EngineConfig(
        ModelConfig(str(model), load_format="random"), CacheConfig(num_blocks=9), brownout=brownout, device="cpu"
    )


def test_what_was_written_is_loaded(model: Path, artefact: Path) -> None:
    slot = load_slot(config(model, artefact))
    stored = load_file(layer_file(artefact, 1))
    experts = slot.model.layers[1].moe.experts
    assert torch.equal(experts.gate_up[12:], stored["gate_up"])
    assert torch.equal(experts.down[12:], stored["down"])
    assert len(slot.model.layers[0].moe.experts.gate_up) == 12  # exempt
    dimmer = slot.model.layers[1].moe.dimmer
    assert dimmer is not None
    assert dimmer.united_of[1, 2].tolist() == [12] * 4 + [13] * 4 + [14] * 4
    assert dimmer.united_of[0, 2].tolist() == list(range(12))


def test_a_group_marked_do_not_use_keeps_its_originals(model: Path, artefact: Path) -> None:
    layers = dict(read_manifest(artefact).layers)
    layers[1] = replace(layers[1], do_not_use=(False, True, False))
    change_manifest(artefact, layers=layers)
    dimmer = load_slot(config(model, artefact)).model.layers[1].moe.dimmer
    assert dimmer is not None
    assert dimmer.united_of[1, 2].tolist() == [12] * 4 + [4, 5, 6, 7] + [14] * 4


def test_protected_experts_of_a_build_are_protected(model: Path, artefact: Path) -> None:
    change_manifest(artefact, protect=((1, 5),))
    dimmer = load_slot(config(model, artefact)).model.layers[1].moe.dimmer
    assert dimmer is not None
    assert dimmer.protected.nonzero().tolist() == [[1, 5]]


def truncate(directory: Path) -> None:
    path = layer_file(directory, 1)
    path.write_bytes(path.read_bytes()[:-100])


def remove_layer(directory: Path) -> None:
    layer_file(directory, 1).unlink()


def rewrite_layer(directory: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Another layer file whose digest the manifest knows."""
    stored = load_file(layer_file(directory, 1))
    digest = write_layer(directory, 1, change(stored["gate_up"]), stored["down"])
    layers = dict(read_manifest(directory).layers)
    layers[1] = replace(layers[1], weights_digest=digest)
    change_manifest(directory, layers=layers)


def drop_key(directory: Path) -> None:
    content = json.loads((directory / "united.json").read_text())
    del content["method"]
    (directory / "united.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda d: change_manifest(d, model_digest="0" * 64), "were built for the model 000000000000; this one is"),
        (lambda d: change_manifest(d, way=2), "layer 0 has a group of another size than 1 to 2"),
        (lambda d: change_manifest(d, hidden_size=65), "have hidden_size 65; the model has 64"),
        (truncate, "are damaged: layer-01.safetensors"),
        (remove_layer, "cannot be read: layer-01.safetensors"),
        (lambda d: rewrite_layer(d, lambda t: t.fill_(float("nan"))), "have weights that are not finite numbers"),
        (lambda d: rewrite_layer(d, lambda t: t[:2]), r"have gate_up of shape \(2, 64, 64\)"),
        (drop_key, "united.json lacks the key 'method'"),
        (lambda d: (d / "united.json").write_text("{"), "cannot be used: united.json"),
        (lambda d: (d / "united.json").unlink(), "have no united.json"),
    ],
)
def test_a_bad_artefact_is_refused_in_one_sentence(
    model: Path, artefact: Path, damage: Callable[[Path], None], complaint: str
) -> None:
    damage(artefact)
    with pytest.raises(ArtefactError, match=complaint) as caught:
        load_slot(config(model, artefact))
    assert "\n" not in str(caught.value)


def test_weights_can_be_checked_without_loading(artefact: Path) -> None:
    UnitedArtefact(artefact).check_weights()
    truncate(artefact)
    with pytest.raises(ArtefactError, match="are damaged"):
        UnitedArtefact(artefact).check_weights()


def test_ways_that_do_not_agree_are_refused(model: Path, artefact: Path) -> None:
    with pytest.raises(ArtefactError, match="are 4-way; allowed here: 2-way"):
        load_slot(config(model, artefact, ways=(2,)))
    with pytest.raises(ConfigError, match=r"no build for brownout.ways \[2\]"):
        load_slot(config(model, artefact, ways=(2, 4)))
    with pytest.raises(ConfigError, match="names two 4-way builds"):
        load_slot(config(model, artefact, artefact))


def test_another_checkpoint_has_another_digest(model: Path, artefact: Path) -> None:
    other = config(model, artefact)
    other = replace(other, model=replace(other.model, seed=1))
    with pytest.raises(ArtefactError, match="were built for the model"):
        load_slot(other)
