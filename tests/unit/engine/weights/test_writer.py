"""Random checkpoints are ordinary ones: transformers loads them, and the engine serves the same as its own draw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.config import ConfigError
from engine.models.layout import checkpoint_tensors
from engine.models.registry import load_spec
from engine.weights.manifest import CheckpointError, TensorSpec
from engine.weights.random import RandomWeights
from engine.weights.safetensors import INDEX_FILE, SINGLE_FILE, SafetensorsCheckpoint
from engine.weights.writer import plan_shards, write_random_checkpoint
from tests.models import FAMILIES, TOKENIZER_FILES, write_config

CPU = torch.device("cpu")


def write(
    source: Path, out: Path, seed: int = 3, dtype: torch.dtype = torch.float32, shard_bytes: int = 1 << 20
) -> Path:
    write_random_checkpoint(source, out, dtype, seed, CPU, shard_bytes)
    return out


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize("sizes", [[], [10], [4, 4, 4], [1, 30, 1], [30, 30], [8, 8, 8, 1]])
def test_shards_keep_the_order_and_the_limit(sizes: list[int]) -> None:
    tensors = [TensorSpec(f"t{index}", (size,)) for index, size in enumerate(sizes)]
    shards = plan_shards(tensors, itemsize=2, max_bytes=17)
    assert [spec for shard in shards for spec in shard.tensors] == tensors
    assert all(sum(s.num_elements for s in shard.tensors) * 2 <= 17 or len(shard.tensors) == 1 for shard in shards)
    assert [shard.name for shard in plan_shards(tensors, 2, 1 << 20)] == [SINGLE_FILE] * bool(sizes)
    assert len({shard.name for shard in shards}) == len(shards)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_every_family(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    source = write_config(tmp_path / "config", **FAMILIES[family])
    out = write(source, tmp_path / "out", dtype=torch.bfloat16)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype is torch.bfloat16
    logits = model(torch.tensor([[1, 2, 3]])).logits.float()
    assert logits.isfinite().all()
    assert 0.01 < logits.std() < 10
    SafetensorsCheckpoint(out).check(checkpoint_tensors(load_spec(out)), load_spec(out).tie_word_embeddings)


def test_the_seed_alone_decides(tmp_path: Path) -> None:
    source = write_config(tmp_path / "config")
    first, second = write(source, tmp_path / "a"), write(source, tmp_path / "b", shard_bytes=1 << 30)
    assert (first / INDEX_FILE).exists() and (second / SINGLE_FILE).exists()
    a, b, c = read_all(first), read_all(second), read_all(write(source, tmp_path / "c", seed=4))
    assert all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys()
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])
    drawn = RandomWeights(3)
    assert all(torch.equal(a[spec.name], drawn.get(spec)) for spec in checkpoint_tensors(load_spec(source)))


def test_the_directory_is_complete(tmp_path: Path) -> None:
    out = write(write_config(tmp_path / "config"), tmp_path / "out", dtype=torch.float16)
    assert all((out / name).exists() for name in TOKENIZER_FILES)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    index = json.loads((out / INDEX_FILE).read_text())
    assert set(index["weight_map"].values()) == {path.name for path in out.glob("*.safetensors")}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in read_all(out).values())


def test_what_is_there_stays(tmp_path: Path) -> None:
    source = write_config(tmp_path / "config")
    with pytest.raises(CheckpointError, match="exists already"):
        write(source, source)
    assert (source / "config.json").exists()


def test_a_config_that_cannot_be_served_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hidden_act"):
        write(write_config(tmp_path / "config", hidden_act="gelu"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_larger_than_the_disk_is_refused(tmp_path: Path) -> None:
    source = write_config(tmp_path / "config", vocab_size=1 << 40)
    with pytest.raises(CheckpointError, match=r"takes \d+\.\d GiB, and \d+\.\d GiB are free"):
        write(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.weights.writer.os.pwrite", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        write(write_config(tmp_path / "config"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
