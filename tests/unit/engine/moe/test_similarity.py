"""Expert similarities: what they measure, and their file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.models.registry import load_spec
from engine.moe.experts import PackedExperts
from engine.moe.similarity import output_similarity, read_similarity, write_similarity
from engine.moe.united import ArtefactError
from tests.models import write_config


def test_experts_are_compared_by_what_they_put_out() -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(4, 16, 6, generator=generator)
    down = torch.randn(4, 6, 8, generator=generator)
    gate_up[1], down[1] = gate_up[0], 2 * down[0]  # the same direction
    gate_up[2], down[2] = gate_up[0], -down[0]  # the opposite one
    similarity = output_similarity(PackedExperts(gate_up, down, 3), torch.randn(50, 6, generator=generator))
    expected = torch.tensor([[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])
    torch.testing.assert_close(similarity, expected)


def test_a_file_of_similarities_belongs_to_one_model(tmp_path: Path) -> None:
    spec, path = load_spec(write_config(tmp_path / "model")), tmp_path / "similarity.safetensors"
    tables = {1: torch.rand(12, 12)}
    write_similarity(path, tables, "this")
    stored = read_similarity(path, spec, "this")
    assert torch.equal(stored[1], tables[1])
    assert (stored[[0, 2]] == float("-inf")).all()
    with pytest.raises(ArtefactError, match="were measured on another model"):
        read_similarity(path, spec, "other")


def test_bad_files_are_refused(tmp_path: Path) -> None:
    spec, path = load_spec(write_config(tmp_path / "model")), tmp_path / "similarity.safetensors"
    with pytest.raises(ArtefactError, match="cannot be read"):
        read_similarity(path, spec, "this")
    write_similarity(path, {1: torch.rand(5, 5)}, "this")
    with pytest.raises(ArtefactError, match="cannot be read"):
        read_similarity(path, spec, "this")
    write_similarity(path, {1: torch.full((12, 12), float("nan"))}, "this")
    with pytest.raises(ArtefactError, match="not numbers"):
        read_similarity(path, spec, "this")
