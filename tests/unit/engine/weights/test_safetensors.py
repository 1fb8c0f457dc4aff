"""Good checkpoints are read; bad ones end in one sentence that names the file or tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.weights.manifest import CheckpointError, TensorSpec
from engine.weights.safetensors import INDEX_FILE, SINGLE_FILE, SafetensorsCheckpoint, check_checkpoint

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.full((4,), 7.0)}
A, B = TensorSpec("a.weight", (2, 3)), TensorSpec("b.weight", (4,))


def write_sharded(directory: Path) -> None:
    save_file({"a.weight": TENSORS["a.weight"]}, directory / "one.safetensors")
    save_file({"b.weight": TENSORS["b.weight"]}, directory / "two.safetensors")
    write_index(directory, {"a.weight": "one.safetensors", "b.weight": "two.safetensors"})


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize("sharded", [False, True])
def test_reads_tensors_by_name(tmp_path: Path, sharded: bool) -> None:
    if sharded:
        write_sharded(tmp_path)
    else:
        save_file(TENSORS, tmp_path / SINGLE_FILE)
    check_checkpoint(tmp_path)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    for spec in (B, A):
        torch.testing.assert_close(checkpoint.get(spec), TENSORS[spec.name])


def expect_refusal(directory: Path, *mentioned: str) -> None:
    for use in (check_checkpoint, SafetensorsCheckpoint):
        with pytest.raises(CheckpointError) as refusal:
            use(directory)
        assert "\n" not in str(refusal.value)
        assert all(word in str(refusal.value) for word in mentioned)


def test_missing_file(tmp_path: Path) -> None:
    expect_refusal(tmp_path, str(tmp_path / SINGLE_FILE), "missing", "model.load_format")


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64])
def test_not_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(content)
    expect_refusal(tmp_path, str(tmp_path / SINGLE_FILE), "not a valid safetensors file")


def test_truncated_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE_FILE)
    truncate(tmp_path / SINGLE_FILE)
    expect_refusal(tmp_path, str(tmp_path / SINGLE_FILE), "not a valid safetensors file")


def test_missing_shard(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    expect_refusal(tmp_path, str(tmp_path / "two.safetensors"), "missing", INDEX_FILE)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_bad_index(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX_FILE).write_text(content)
    expect_refusal(tmp_path, str(tmp_path / INDEX_FILE), "cannot read")


def test_truncated_shard_is_found_before_weights_are_read_and_when_reading(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    truncate(tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"two\.safetensors is not a valid safetensors file"):
        check_checkpoint(tmp_path)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    torch.testing.assert_close(checkpoint.get(A), TENSORS["a.weight"])
    with pytest.raises(CheckpointError, match=r"two\.safetensors is not a valid safetensors file"):
        checkpoint.get(B)


def test_missing_tensor(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=r"has no tensor c\.weight"):
        SafetensorsCheckpoint(tmp_path).get(TensorSpec("c.weight", (1,)))


def test_a_tensor_that_only_the_index_knows(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    write_index(tmp_path, {"c.weight": "one.safetensors"})
    with pytest.raises(CheckpointError, match=r"cannot read tensor c\.weight from .*one\.safetensors"):
        SafetensorsCheckpoint(tmp_path).get(TensorSpec("c.weight", (1,)))


def test_wrong_shape(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=r"a\.weight in .* has shape \(2, 3\), the config implies \(3, 2\)"):
        SafetensorsCheckpoint(tmp_path).get(TensorSpec("a.weight", (3, 2)))
