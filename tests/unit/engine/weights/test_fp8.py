"""fp8 matrices are read as code times scale of their block; what lacks its scales is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.training.fp8 import quantise, quantise_checkpoint, round_to_fp8_
from engine.weights.fp8 import SCALE_SUFFIX, expand_scales
from engine.weights.manifest import CheckpointError, Target, TensorSpec
from engine.weights.safetensors import SINGLE_FILE, SafetensorsCheckpoint

BLOCK = (4, 8)
MATRIX, NORM = TensorSpec("layers.0.mlp.down_proj.weight", (10, 12)), TensorSpec("layers.0.norm.weight", (12,))
SCALES = MATRIX.name + SCALE_SUFFIX


def stored_tensors() -> dict[str, torch.Tensor]:
    """Blocks of very different sizes, one of them zero, none of them whole at the far edges."""
    matrix = torch.randn(MATRIX.shape, generator=torch.Generator().manual_seed(0))
    matrix[:4] *= 1000
    matrix[4:8, :8] = 0
    codes, scales = quantise(matrix, BLOCK)
    return {MATRIX.name: codes, SCALES: scales, NORM.name: torch.ones(NORM.shape, dtype=torch.bfloat16)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_codes_times_scales(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = stored_tensors()
    save_file(tensors, tmp_path / SINGLE_FILE)
    checkpoint = SafetensorsCheckpoint(tmp_path, BLOCK)
    checkpoint.check((MATRIX, NORM))
    targets = [Target(spec, torch.full(spec.shape, float("nan"), dtype=dtype)) for spec in (MATRIX, NORM)]
    told: list[int] = []
    checkpoint.fill(targets, told.append)

    wide = torch.empty(MATRIX.shape)
    for row in range(10):
        for column in range(12):
            scale = tensors[SCALES][row // 4, column // 8]
            wide[row, column] = tensors[MATRIX.name][row, column].float() * scale
    assert torch.equal(targets[0].tensor, wide.to(dtype))
    assert torch.equal(targets[1].tensor, torch.ones(12, dtype=dtype))
    assert sum(told) == sum(target.tensor.nbytes for target in targets)


@pytest.mark.parametrize(
    ("tensors", "block", "mentioned"),
    [
        ({SCALES: None}, BLOCK, [SCALES]),
        ({SCALES: torch.ones(3, 3)}, BLOCK, [SCALES, "(3, 3)", "(3, 2)"]),
        ({}, None, [MATRIX.name, "F8_E4M3", "BF16"]),
        ({NORM.name: torch.ones(12).to(torch.float8_e4m3fn)}, BLOCK, [NORM.name, "F8_E4M3"]),
    ],
    ids=["no scales", "scales of another block", "a config without blocks", "a vector"],
)
def test_what_cannot_be_widened_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor | None], block: tuple[int, int] | None, mentioned: list[str]
) -> None:
    content = {name: tensor for name, tensor in (stored_tensors() | tensors).items() if tensor is not None}
    save_file(content, tmp_path / SINGLE_FILE)
    with pytest.raises(CheckpointError) as refusal:
        SafetensorsCheckpoint(tmp_path, block).check((MATRIX, NORM))
    assert all(word in str(refusal.value) for word in mentioned)


def test_what_is_stored_is_near_and_stays_when_stored_again() -> None:
    matrix = torch.randn(200, 300, generator=torch.Generator().manual_seed(1))
    rounded = matrix.clone()
    round_to_fp8_(rounded)
    assert 0.001 < float((rounded - matrix).norm() / matrix.norm()) < 0.04  # three bits of mantissa
    stored = quantise_checkpoint({"mlp.up_proj.weight": rounded, "mlp.gate.weight": matrix})
    scales = stored["mlp.up_proj.weight" + SCALE_SUFFIX]
    assert torch.allclose(stored["mlp.up_proj.weight"].float() * expand_scales(scales, (128, 128), (200, 300)), rounded)
    assert set(stored) == {"mlp.up_proj.weight", "mlp.up_proj.weight" + SCALE_SUFFIX, "mlp.gate.weight"}
