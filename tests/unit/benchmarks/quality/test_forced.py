"""Forced steps predict what the model predicts, whatever the step size; dimming shows as a loss and fewer experts."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quality.forced import ForcedModel, ForcedScorer
from benchmarks.quality.questions import Question, accuracy
from benchmarks.quality.scorers import EngineScorer
from benchmarks.quality.scoring import Request
from engine.config import BrownoutConfig, CacheConfig, EngineConfig, ModelConfig
from engine.engine import Engine
from engine.moe.ladder import Ladder, Level
from engine.moe.settings import DimmerKind, DimSetting
from engine.pool.slots import ModelSlot
from tests.models import write_checkpoint

NUM_SEQUENCES, NUM_TOKENS = 6, 20


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    directory = write_checkpoint(tmp_path_factory.mktemp("model"))
    settings = [DimSetting(), DimSetting(DimmerKind.UNITED, way=4, share=1.0)]
    Ladder.uniform([Level(setting) for setting in settings]).write(directory / "ladder.json")
    brownout = BrownoutConfig(ways=(4,), exempt_first=0, exempt_last=0, allow_unmeasured=True, profile_repeats=0)
    cache = CacheConfig(num_blocks=600, prefix_caching=False)
    return Engine(EngineConfig(ModelConfig(str(directory)), cache, brownout=brownout, device="cpu"))


@pytest.fixture
def slot(engine: Engine):  # type: ignore[no-untyped-def]
    slot = engine.leave()
    yield slot
    engine.take_up(slot)


@pytest.fixture
def forced(slot: ModelSlot) -> ForcedModel:
    return ForcedModel(slot, max_batch=NUM_SEQUENCES, max_tokens=NUM_TOKENS)


@pytest.fixture(scope="module")
def sequences() -> torch.Tensor:
    return torch.randint(4000, (NUM_SEQUENCES, NUM_TOKENS), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("batch", [None, 4])
def test_steps_of_any_size_predict_the_same_undimmed(
    forced: ForcedModel, sequences: torch.Tensor, batch: int | None
) -> None:
    whole = forced.reference(sequences, NUM_SEQUENCES)
    comparison = forced.compare(sequences, 0, batch, whole)
    assert comparison.dnll == pytest.approx(0.0, abs=1e-5)
    assert comparison.kl == pytest.approx(0.0, abs=1e-5)
    assert comparison.agreement == 1.0


def test_dimming_costs_and_saves(forced: ForcedModel, sequences: torch.Tensor) -> None:
    reference = forced.reference(sequences, NUM_SEQUENCES)
    for batch in (None, NUM_SEQUENCES):
        assert forced.compare(sequences, 1, batch, reference).kl > 1e-3
        assert forced.distinct_experts(sequences, 1, batch) < forced.distinct_experts(sequences, 0, batch) <= 12
    assert all(layer.moe.dimmer is not None for layer in forced.slot.model.layers)  # the counters are gone again


def test_engine_and_forced_steps_score_alike(engine: Engine) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = (9, 17, 4, 12)
    requests = [Request(tuple(torch.randint(4000, (n,), generator=generator).tolist()), n // 2) for n in lengths]
    by_engine = EngineScorer(engine, 0).score(requests)
    slot = engine.leave()
    try:
        forced = ForcedModel(slot, max_batch=3, max_tokens=NUM_TOKENS)
        for batch in (None, 3):
            assert ForcedScorer(forced, 0, batch).score(requests) == pytest.approx(by_engine, abs=1e-3)
    finally:
        engine.take_up(slot)
    assert EngineScorer(engine, 1).score(requests) != pytest.approx(by_engine, abs=1e-3)


def test_accuracy_is_by_likelihood_per_byte() -> None:
    class Known:
        def score(self, requests: list[Request]) -> list[float]:
            return [-3.0, -4.0, -1.0, -9.0]

    questions = [Question("a", (" b", " cdef"), 1), Question("a", (" b", " c"), 1)]  # -1.5 against -0.8; -0.5, -4.5
    assert accuracy(questions, Known(), lambda text: [ord(c) for c in text]) == 0.5  # type: ignore[arg-type]
