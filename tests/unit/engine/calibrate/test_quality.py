"""The quality meter against steps computed one by one, as they are served."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.batch import StepRows, to_device
from engine.calibrate.candidates import StepSize
from engine.calibrate.quality import QualityMeter
from engine.config import BrownoutConfig, CacheConfig, ConfigError, EngineConfig, ModelConfig
from engine.moe.settings import DimmerKind, DimSetting
from engine.pool.slots import ModelSlot, load_slot
from engine.types import Levels, Phase
from tests.models import write_checkpoint

NUM_SEQUENCES, NUM_TOKENS = 8, 6
SETTINGS = [
    DimSetting(DimmerKind.UNITED, way=4, share=0.7),
    DimSetting(DimmerKind.PIGGYBACK, keep=1),
    DimSetting(DimmerKind.UNITED, way=2, share=1.0, top_k=(4, 3, 4)),
]


@pytest.fixture(scope="module")
def slot(tmp_path_factory: pytest.TempPathFactory) -> ModelSlot:
    model = write_checkpoint(tmp_path_factory.mktemp("model"))
    brownout = BrownoutConfig(ways=(2, 4), exempt_first=0, exempt_last=1, ladder="default", allow_unmeasured=True)
    return load_slot(EngineConfig(ModelConfig(str(model)), CacheConfig(num_blocks=40), brownout=brownout, device="cpu"))


@pytest.fixture(scope="module")
def sequences() -> Tensor:
    return torch.randint(4096, (NUM_SEQUENCES, NUM_TOKENS), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def decode_losses(slot: ModelSlot, sequences: Tensor, setting: int, batch: int) -> Tensor:
    """[S, T - 1] negative log-likelihoods, one real decode step at a time."""
    losses = torch.empty(NUM_SEQUENCES, NUM_TOKENS - 1)
    for first in range(0, NUM_SEQUENCES, batch):
        part = sequences[first : first + batch]
        tables = np.arange(1, batch + 1, dtype=np.int32)[:, None]
        for position in range(NUM_TOKENS - 1):
            rows = StepRows.decodes(part[:, position].numpy(), np.full(batch, position), tables)
            inputs = to_device(rows, slot.kv.block_size, Levels(0, setting), slot.device)
            logits = slot.model.forward(inputs, slot.kv).logits.log_softmax(-1)
            losses[first : first + batch, position] = -logits.gather(1, part[:, position + 1, None])[:, 0]
    return losses


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("batch", [2, 8])
def test_a_pass_over_prompts_equals_decode_steps(
    slot: ModelSlot, sequences: Tensor, setting: DimSetting, batch: int
) -> None:
    quality = QualityMeter(slot, sequences).measure(setting, StepSize(Phase.DECODE, batch))
    expected = (decode_losses(slot, sequences, 1, batch) - decode_losses(slot, sequences, 0, batch)).mean(dim=1)
    assert abs(float(expected.mean())) > 1e-3
    assert quality.loss == pytest.approx(float(expected.mean()), abs=1e-5)
    assert quality.se == pytest.approx(float(expected.std()) / NUM_SEQUENCES**0.5, abs=1e-5)
    assert quality.kl > 0
    assert quality.experts < quality.exact_experts <= 12


def test_a_prefill_step_has_whole_sequences(slot: ModelSlot, sequences: Tensor) -> None:
    meter = QualityMeter(slot, sequences)
    small, large = (meter.measure(SETTINGS[0], StepSize(Phase.PREFILL, n * NUM_TOKENS)) for n in (1, NUM_SEQUENCES))
    assert small.exact_experts < large.exact_experts
    assert small.loss != large.loss


def test_the_exact_setting_loses_nothing(slot: ModelSlot, sequences: Tensor) -> None:
    quality = QualityMeter(slot, sequences).measure(DimSetting(), StepSize(Phase.DECODE, 4))
    assert (quality.loss, quality.se, quality.kl) == pytest.approx((0, 0, 0), abs=1e-6)
    assert quality.experts == quality.exact_experts


def test_a_step_needs_as_many_sequences(slot: ModelSlot, sequences: Tensor) -> None:
    with pytest.raises(ConfigError, match="a decode 9 step takes 9 sequences of 6 tokens, and the text gives 8"):
        QualityMeter(slot, sequences).measure(SETTINGS[0], StepSize(Phase.DECODE, 9))


def test_the_slot_is_left_as_it_was(slot: ModelSlot, sequences: Tensor) -> None:
    before = [layer.moe.dimmer for layer in slot.model.layers]
    QualityMeter(slot, sequences).measure(SETTINGS[1], StepSize(Phase.DECODE, 4))
    assert [layer.moe.dimmer for layer in slot.model.layers] == before
