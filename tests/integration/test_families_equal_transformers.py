"""Every family computes what transformers computes: logits and greedy tokens, whole prompts, chunks and batches."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from engine.engine import Engine
from engine.types import GenerationRequest, SamplingParams
from tests.models import FAMILIES, write_checkpoint

PROMPT_LENGTHS = (1, 3, 17, 40, 90, 130)
NUM_TOKENS = 24


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", **FAMILIES[request.param])


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    rng = random.Random(0)
    return [tuple(rng.randrange(4096) for _ in range(length)) for length in PROMPT_LENGTHS]


@torch.inference_mode()
def test_family_equals_transformers(checkpoint: Path, prompts: list[tuple[int, ...]]) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for scheduler in (
        SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=512),
        SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=7),
    ):
        engine = Engine(
            EngineConfig(ModelConfig(str(checkpoint)), scheduler=scheduler, cache=CacheConfig(num_blocks=100))
        )
        for prompt, answer, logits in generate(engine, prompts):
            expected = reference(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
            assert answer == expected.argmax(-1).tolist()


def generate(engine: Engine, prompts: list[tuple[int, ...]]) -> list[tuple[tuple[int, ...], list[int], torch.Tensor]]:
    """Each prompt, its greedy answer, and the logits [NUM_TOKENS, V] that each token was chosen from."""
    slot = engine.leave()
    forward = slot.model.forward
    rows: dict[str, list[torch.Tensor]] = {}
    steps: list[torch.Tensor] = []

    def forward_and_record(batch, kv):  # type: ignore[no-untyped-def]
        output = forward(batch, kv)
        steps.append(output.logits)
        return output

    slot.model.forward = forward_and_record  # type: ignore[method-assign]
    engine.take_up(slot)
    answers: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
        engine.add(GenerationRequest(str(index), prompt, sampling))
        answers[str(index)], rows[str(index)] = [], []
    while engine.has_work:
        for row, output in enumerate(engine.step()):
            answers[output.request_id] += output.token_ids
            rows[output.request_id].append(steps[-1][row])
    return [(prompt, answers[str(index)], torch.stack(rows[str(index)])) for index, prompt in enumerate(prompts)]
