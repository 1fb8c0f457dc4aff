"""Whole builds on a tiny checkpoint: what is captured, what is stored, and going on after an interruption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.config import ConfigError, ModelConfig
from engine.moe.united import UnitedArtefact
from engine.pool.slots import ModelSlot
from engine.unite.build import Job, Progress, UniteOptions, unite
from engine.unite.calibration import CalibrationError, cut_sequences
from engine.unite.capture import load_for_calibration, trace_layers
from engine.unite.distil import DistilOptions
from engine.unite.protect import super_experts
from engine.weights.digest import model_digest
from tests.models import write_checkpoint

NUM_TOKENS = 24
OPTIONS = UniteOptions(exempt_first=1, exempt_last=0, distil=DistilOptions(num_steps=5, num_tokens=64))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def slot(directory: Path) -> ModelSlot:
    return load_for_calibration(ModelConfig(str(directory)), NUM_TOKENS, "cpu")


@pytest.fixture(scope="module")
def sequences() -> torch.Tensor:
    return torch.randint(4000, (72, NUM_TOKENS), generator=torch.Generator().manual_seed(0))


def test_captured_inputs_are_those_of_transformers(
    directory: Path, slot: ModelSlot, sequences: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Qwen2MoeForCausalLM

    monkeypatch.setattr("engine.unite.capture.BATCH_TOKENS", 5 * NUM_TOKENS)  # several batches, the last one smaller
    wanted: list[torch.Tensor] = []
    reference = Qwen2MoeForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for layer in reference.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: wanted.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        reference(sequences)
    traces = list(trace_layers(slot, sequences))
    assert [layer for layer, _ in traces] == [0, 1, 2]
    for (_, trace), inputs in zip(traces, wanted, strict=True):
        torch.testing.assert_close(trace.inputs, inputs, rtol=1e-4, atol=1e-4)
        assert trace.ids.shape == (72 * NUM_TOKENS, 4)


def test_an_interrupted_build_goes_on_where_it_stopped(
    tmp_path: Path, directory: Path, slot: ModelSlot, sequences: torch.Tensor
) -> None:
    digest = model_digest(directory)
    whole = [Job(way, method, tmp_path / f"{method}-{way}") for way in (2, 4) for method in ("routed", "instant")]
    unite(slot, digest, sequences, whole, OPTIONS)

    class Interrupted(Exception):
        pass

    seen: list[Progress] = []

    def interrupt(progress: Progress) -> None:
        seen.append(progress)
        if len(seen) == 1:
            raise Interrupted

    job = Job(4, "routed", tmp_path / "resumed")
    with pytest.raises(Interrupted):
        unite(slot, digest, sequences, [job], OPTIONS, interrupt)
    unite(slot, digest, sequences, [job], OPTIONS, interrupt)
    assert [(p.layer, p.num_done, p.num_total) for p in seen] == [(1, 1, 2), (2, 2, 2)]

    resumed, straight = UnitedArtefact(job.directory), UnitedArtefact(tmp_path / "routed-4")
    assert resumed.manifest.layers == straight.manifest.layers  # the digests of the weights too
    resumed.check_fits(slot.spec, digest, (4,))
    resumed.check_weights()
    assert straight.manifest.details["held_out_error"] > UnitedArtefact(tmp_path / "routed-2").manifest.details[
        "held_out_error"
    ]  # fmt: skip

    with pytest.raises(ConfigError, match="other options"):
        unite(slot, digest, sequences, [job], UniteOptions(exempt_first=1, exempt_last=0, max_error=0.1))


def test_groups_above_the_limit_are_marked(
    tmp_path: Path, directory: Path, slot: ModelSlot, sequences: torch.Tensor
) -> None:
    options = UniteOptions(groupings=("consecutive",), exempt_first=1, exempt_last=1, max_error=1e-6)
    unite(slot, model_digest(directory), sequences, [Job(2, "average", tmp_path)], options)
    artefact = UnitedArtefact(tmp_path)
    assert artefact.manifest.layers[1].do_not_use == (True,) * 6
    assert artefact.groups(1) == ((),) * 6


def test_too_little_text_is_refused_with_the_reason() -> None:
    def encode(text: str) -> list[int]:
        return [ord(c) for c in text]

    assert cut_sequences(["abc " * 4000], encode, 80, 16).shape == (80, 16)
    with pytest.raises(CalibrationError, match="gives 10 sequences of 16 tokens, and at least 64"):
        cut_sequences(["abc " * 330], encode, 80, 16)


def test_super_experts_stand_out() -> None:
    quiet = {layer: [1.0 + 0.01 * expert for expert in range(60)] for layer in range(10)}
    assert super_experts(quiet) == ()
    quiet[3][7] = 500.0
    assert super_experts(quiet) == ((3, 7),)
