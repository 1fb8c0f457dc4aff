"""Good checkpoints are read; bad ones end in one sentence that names the file or tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.weights.manifest import CheckpointError, Target, TensorSpec
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


def load(directory: Path, *specs: TensorSpec, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    checkpoint = SafetensorsCheckpoint(directory)
    checkpoint.check(specs)
    targets = [Target(spec, torch.full(spec.shape, float("nan"), dtype=dtype)) for spec in specs]
    told: list[int] = []
    checkpoint.fill(targets, told.append)
    assert sum(told) == sum(target.tensor.nbytes for target in targets)
    return [target.tensor for target in targets]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_tensors_by_name(tmp_path: Path, sharded: bool, dtype: torch.dtype) -> None:
    if sharded:
        write_sharded(tmp_path)
    else:
        save_file(TENSORS, tmp_path / SINGLE_FILE)
    check_checkpoint(tmp_path)
    b, a = load(tmp_path, B, A, dtype=dtype)
    assert torch.equal(a, TENSORS["a.weight"].to(dtype))
    assert torch.equal(b, TENSORS["b.weight"].to(dtype))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
def test_converts_to_the_models_dtype(tmp_path: Path, stored: torch.dtype) -> None:
    save_file({name: tensor.to(stored) for name, tensor in TENSORS.items()}, tmp_path / SINGLE_FILE)
    assert torch.equal(load(tmp_path, A, B)[0], TENSORS["a.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tensors_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr("engine.weights.stream.PIECE_BYTES", 64)
    tensor = torch.arange(1003.0)
    save_file({"w": tensor, "b.weight": TENSORS["b.weight"]}, tmp_path / SINGLE_FILE)
    assert torch.equal(load(tmp_path, TensorSpec("w", (1003,)), B, dtype=dtype)[0], tensor.to(dtype))


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


def test_truncated_shard_is_found_before_weights_are_read(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    truncate(tmp_path / "two.safetensors")
    expect_refusal(tmp_path, str(tmp_path / "two.safetensors"), "not a valid safetensors file")


def test_a_file_that_is_cut_while_being_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE_FILE)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    truncate(tmp_path / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends at byte \d+"):
        checkpoint.fill([Target(spec, torch.empty(spec.shape)) for spec in (A, B)], lambda num_bytes: None)


def expect_mismatch(directory: Path, message: str, *specs: TensorSpec, tied: bool = False) -> None:
    with pytest.raises(CheckpointError, match=message) as refusal:
        SafetensorsCheckpoint(directory).check(specs, tied)
    assert "\n" not in str(refusal.value)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE_FILE)
    expect_mismatch(tmp_path, r"has no tensor c\.weight$", A, B, TensorSpec("c.weight", (1,)))
    many = [TensorSpec(f"c{i}", (1,)) for i in range(5)]
    expect_mismatch(tmp_path, r"has no tensors c0, c1, c2 and 2 more$", A, B, *many)


def test_a_tensor_that_only_the_index_knows(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    write_index(tmp_path, {"a.weight": "one.safetensors", "c.weight": "one.safetensors"})
    expect_mismatch(tmp_path, r"has no tensor c\.weight", A, TensorSpec("c.weight", (1,)))


def test_unexpected_tensors_are_named(tmp_path: Path) -> None:
    save_file(TENSORS | {"layers.0.rotary_emb.inv_freq": torch.ones(2)}, tmp_path / SINGLE_FILE)
    expect_mismatch(tmp_path, r"has tensor b\.weight, which the config does not imply", A)


def test_a_copy_of_a_tied_output_layer_is_ignored(tmp_path: Path) -> None:
    save_file(TENSORS | {"lm_head.weight": torch.ones(2)}, tmp_path / SINGLE_FILE)
    SafetensorsCheckpoint(tmp_path).check((A, B), tied=True)
    expect_mismatch(tmp_path, r"has tensor lm_head\.weight", A, B)


def test_wrong_shape(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE_FILE)
    wrong = TensorSpec("a.weight", (3, 2))
    expect_mismatch(tmp_path, r"a\.weight in .* has shape \(2, 3\), the config implies \(3, 2\)", wrong, B)


def test_wrong_type(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 3, dtype=torch.int8)}, tmp_path / SINGLE_FILE)
    expect_mismatch(tmp_path, r"a\.weight in .* is I8; allowed: F32", A)
