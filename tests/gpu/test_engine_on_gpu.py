"""The whole engine on a GPU: Triton kernels and decode graphs against the plain torch path on the same card."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import BrownoutConfig, CacheConfig, ConfigError
from engine.engine import Engine
from engine.layers import launch
from engine.types import BrownoutSetting, GenerationRequest, SamplingParams, ServiceClass
from tests.gpu.engines import UNDIMMED, UNITED, make_engine, record_logits
from tests.models import FAMILIES, write_checkpoint

pytestmark = pytest.mark.gpu

NUM_TOKENS = 40

Prompts = list[tuple[int, ...]]


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    rng = random.Random(0)
    return [tuple(rng.randrange(4096) for _ in range(rng.choice((1, 3, 16, 17, 40, 90)))) for _ in range(13)]


def generate(engine: Engine, prompts: Iterable[tuple[int, ...]]) -> tuple[list[list[int]], list[int]]:
    """Greedy tokens and dimmed pairs of each prompt; every fourth refuses to be dimmed."""
    answers: dict[str, list[int]] = {}
    dimmed: dict[str, int] = {}
    for index, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=NUM_TOKENS - index, temperature=0, ignore_eos=True)
        consent = ServiceClass.FULL if index % 4 == 3 else ServiceClass.STANDARD
        engine.add(GenerationRequest(str(index), prompt, sampling, consent))
        answers[str(index)] = []
    while engine.has_work:
        for output in engine.step():
            answers[output.request_id] += output.token_ids
            if output.usage is not None:
                dimmed[output.request_id] = output.usage.brownout.dimmed_pairs
    return list(answers.values()), [dimmed[request_id] for request_id in answers]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_every_family_on_triton_equals_torch(
    gpu: torch.device, tmp_path: Path, prompts: Prompts, family: str, cuda_graphs: bool
) -> None:
    directory = write_checkpoint(tmp_path / "tiny", **FAMILIES[family])
    results = [
        generate(make_engine(directory, BrownoutConfig(), kernels=kernels, cuda_graphs=cuda_graphs), prompts)
        for kernels in ("torch", "triton")
    ]
    assert results[0] == results[1]


def test_the_pool_is_what_the_measured_step_leaves(gpu: torch.device, checkpoint: Path) -> None:
    engine = make_engine(checkpoint, UNITED, cache=CacheConfig(memory_frac=0.5))
    assert engine.info.num_blocks == 16 * 512 // 16 + 1  # a full batch of the longest sequences: tiny models have room
    with pytest.raises(ConfigError, match=r"cache\.num_blocks is 100000000, .* are free; allowed: at most \d+"):
        make_engine(checkpoint, UNITED, cache=CacheConfig(num_blocks=100_000_000))


@pytest.mark.parametrize("level", [0, 2, 4])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_triton_equals_torch(
    gpu: torch.device, checkpoint: Path, prompts: Prompts, level: int, cuda_graphs: bool
) -> None:
    results = []
    for engine in (
        make_engine(checkpoint, UNITED, kernels="torch"),
        make_engine(checkpoint, UNITED, cuda_graphs=cuda_graphs),
    ):
        assert engine.apply_setting(BrownoutSetting.pinned(level))
        results.append(generate(engine, prompts))
    assert results[0] == results[1]
    assert (sum(results[0][1]) > 0) == (level > 0)


def test_a_level_change_acts_on_the_next_replay(gpu: torch.device, checkpoint: Path) -> None:
    engine = make_engine(checkpoint, UNITED)
    sampling = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
    for index in range(8):
        engine.add(GenerationRequest(str(index), (index + 5,), sampling))
    engine.step()
    engine.step()  # the prompts' step has ended, the first decode step is under way
    dimmed_at = []
    for version, level in enumerate((0, 4, 0, 2), start=1):
        engine.apply_setting(replace(BrownoutSetting.pinned(level), version=version))
        engine.step()  # ends the step before, begins one at the new level
        before = sum(s.dimmed_pairs for s in engine.scheduler.running)
        engine.step()
        dimmed_at.append(sum(s.dimmed_pairs for s in engine.scheduler.running) - before)
    assert dimmed_at[0] == dimmed_at[2] == 0
    assert dimmed_at[1] >= dimmed_at[3] > 0


def test_level_0_is_bit_identical_with_united_experts_loaded(
    gpu: torch.device, checkpoint: Path, prompts: Prompts
) -> None:
    logits = []
    for brownout in (UNDIMMED, UNITED):
        engine = make_engine(checkpoint, brownout)
        recorded = record_logits(engine)
        generate(engine, prompts)
        logits.append(recorded)
    plain, united = logits
    assert len(plain) == len(united) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, united, strict=True))


def test_dependent_launch_changes_no_token(
    gpu: torch.device, checkpoint: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for first_capability in (launch.FIRST_CAPABILITY, 99):
        monkeypatch.setattr(launch, "FIRST_CAPABILITY", first_capability)
        engine = make_engine(checkpoint, UNITED)
        assert engine.apply_setting(BrownoutSetting.pinned(2))
        results.append(generate(engine, prompts))
    assert results[0] == results[1]


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_expert_load_is_counted_in_the_kernels(
    gpu: torch.device, checkpoint: Path, prompts: Prompts, cuda_graphs: bool
) -> None:
    """Every computed token has as many pairs in each layer as experts are chosen for it."""
    engine = make_engine(checkpoint, UNITED, cuda_graphs=cuda_graphs)
    generate(engine, prompts)
    counter = engine.leave().counter
    assert counter is not None
    torch.cuda.synchronize()
    num_tokens = sum(len(prompt) + NUM_TOKENS - index - 1 for index, prompt in enumerate(prompts))
    for layer in range(3):
        totals = counter.totals(layer).tolist()
        assert sum(totals[:-1]) == 4 * num_tokens
        assert 0 < totals[-1] < 4 * num_tokens
