"""United experts for tests: maps without weights, and artefacts as `brownoutserve unite` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from engine.models.registry import load_spec
from engine.moe.table import WAY_ROW
from engine.moe.united import Grouping, LayerGroups, UnitedManifest, consecutive_groups, write_layer
from engine.weights.digest import model_digest


def map_united(united_of: Tensor, groupings: Sequence[Grouping]) -> None:
    """Fill ``united_of`` [L, ways, E] alike in every layer, packed ids in the groupings' order."""
    next_id = united_of.shape[-1]
    for grouping in groupings:
        for members in grouping.groups:
            united_of[:, WAY_ROW[grouping.way], list(members)] = next_id
            next_id += 1


def write_united(directory: Path, model: Path, way: int, seed: int = 0, random_seed: int | None = None) -> Path:
    """Random united experts for every layer of the model; ``random_seed``: of a model with random weights."""
    spec = load_spec(model)
    generator = torch.Generator().manual_seed(seed)
    groups = consecutive_groups(spec.num_experts, way).groups
    layers = {}
    for layer in range(spec.num_layers):
        gate_up = torch.randn(len(groups), 2 * spec.expert_size, spec.hidden_size, generator=generator) * 0.15
        down = torch.randn(len(groups), spec.hidden_size, spec.expert_size, generator=generator) * 0.15
        digest = write_layer(directory, layer, gate_up, down)
        layers[layer] = LayerGroups(groups, (0.1,) * len(groups), (False,) * len(groups), digest)
    UnitedManifest(
        way=way,
        method="random",
        model_digest=model_digest(model, random_seed),
        calibration_digest="none",
        num_experts=spec.num_experts,
        hidden_size=spec.hidden_size,
        expert_size=spec.expert_size,
        layers=layers,
    ).write(directory)
    return directory


def change_manifest(directory: Path, **changes: object) -> None:
    """Rewrite fields of an artefact's manifest."""
    from engine.moe.united import read_manifest

    replace(read_manifest(directory), **changes).write(directory)  # type: ignore[arg-type]
