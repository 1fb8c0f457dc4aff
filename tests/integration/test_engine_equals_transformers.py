"""Greedy tokens equal transformers' Qwen2MoeForCausalLM, however the engine cuts, batches, preempts or reuses work."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from engine.config import BrownoutConfig, CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from engine.engine import Engine
from engine.types import GenerationRequest, SamplingParams
from tests.models import write_checkpoint

NUM_PROMPTS = 32
NUM_TOKENS = 64
SHARED_PREFIX = 48  # three blocks
NO_DIMMING = BrownoutConfig()
ONE_AT_A_TIME = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=512)
UNITED = BrownoutConfig(ways=(2, 4), exempt_first=0, exempt_last=0, allow_unmeasured=True, profile_repeats=0)

Prompt = tuple[int, ...]
Prompts = list[Prompt]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    """Mixed lengths; every third one starts with the same three blocks."""
    rng = random.Random(0)
    prefix = [rng.randrange(4096) for _ in range(SHARED_PREFIX)]
    lengths = [rng.choice((1, 3, 16, 17, 40, 90)) for _ in range(NUM_PROMPTS)]
    tails = [[rng.randrange(4096) for _ in range(n)] for n in lengths]
    return [tuple(prefix + tail if i % 3 == 0 else tail) for i, tail in enumerate(tails)]


@pytest.fixture(scope="module")
def expected(checkpoint: Path, prompts: Prompts) -> list[list[int]]:
    from transformers import Qwen2MoeForCausalLM

    model = Qwen2MoeForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    answers: dict[Prompt, list[int]] = {}
    for length in {len(prompt) for prompt in prompts}:  # equal lengths need no padding
        alike = [prompt for prompt in prompts if len(prompt) == length]
        ids = torch.tensor(alike)
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
        answers |= zip(alike, generated[:, length:].tolist(), strict=True)
    return [answers[prompt] for prompt in prompts]


def make_engine(
    checkpoint: Path,
    scheduler: SchedulerConfig | None = None,
    cache: CacheConfig | None = None,
    brownout: BrownoutConfig = NO_DIMMING,
    overlap_steps: bool | None = None,
) -> Engine:
    return Engine(
        EngineConfig(
            ModelConfig(str(checkpoint)),
            scheduler=scheduler or SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=512),
            cache=cache or CacheConfig(),
            brownout=brownout,
            overlap_steps=overlap_steps,
        )
    )


def generate(engine: Engine, prompts: Iterable[tuple[int, ...]]) -> list[list[int]]:
    """All prompts at once, greedily; checks the block manager's books after every step."""
    answers: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
        engine.add(GenerationRequest(str(index), prompt, sampling))
        answers[str(index)] = []
    while engine.has_work:
        for output in engine.step():
            answers[output.request_id] += output.token_ids
        engine.scheduler.blocks.check_invariants()
    assert engine.scheduler.blocks.num_used == 0
    return list(answers.values())


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"scheduler": ONE_AT_A_TIME},
        {"scheduler": SchedulerConfig(max_num_seqs=5, max_num_batched_tokens=7)},
        {"cache": CacheConfig(block_size=4, prefix_caching=False)},
        {"brownout": UNITED},
        {"overlap_steps": True},
        {"overlap_steps": True, "scheduler": SchedulerConfig(max_num_seqs=5, max_num_batched_tokens=7)},
    ],
    ids=[
        "batched",
        "one at a time",
        "chunked",
        "small blocks, no prefix cache",
        "united experts loaded, level 0",
        "overlapping steps",
        "overlapping steps, chunked",
    ],
)
def test_greedy_equals_transformers(
    checkpoint: Path, prompts: Prompts, expected: list[list[int]], case: dict[str, object]
) -> None:
    some = slice(12 if case.get("scheduler") == ONE_AT_A_TIME else NUM_PROMPTS)  # a step for each token takes long
    assert generate(make_engine(checkpoint, **case), prompts[some]) == expected[some]  # type: ignore[arg-type]


@pytest.mark.parametrize("overlap_steps", [False, True])
def test_greedy_equals_transformers_when_preempted(
    checkpoint: Path, prompts: Prompts, expected: list[list[int]], overlap_steps: bool
) -> None:
    engine = make_engine(checkpoint, cache=CacheConfig(num_blocks=41), overlap_steps=overlap_steps)
    assert generate(engine, prompts) == expected
    assert engine.stats().num_preemptions > 0


def test_greedy_equals_transformers_with_prefix_hits(
    checkpoint: Path, prompts: Prompts, expected: list[list[int]]
) -> None:
    engine = make_engine(checkpoint)
    generate(engine, prompts)
    num_tokens_cold = engine.stats().num_tokens
    assert generate(engine, prompts) == expected
    assert engine.stats().num_tokens - num_tokens_cold < num_tokens_cold * 0.8


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"scheduler": SchedulerConfig(max_num_seqs=5, max_num_batched_tokens=7)},
        {"cache": CacheConfig(num_blocks=41)},
    ],
    ids=["batched", "chunked", "preempted"],
)
def test_prompt_logprobs_equal_transformers(checkpoint: Path, prompts: Prompts, case: dict[str, object]) -> None:
    """Also where the prompt is in the prefix cache already, and beside requests that ask for none."""
    from transformers import Qwen2MoeForCausalLM

    model = Qwen2MoeForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    engine = make_engine(checkpoint, **case)  # type: ignore[arg-type]
    for number, prompt in enumerate(prompts):
        asks = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True, prompt_logprobs=2 if number % 2 else None)
        engine.add(GenerationRequest(str(number), prompt, asks))
    engine.add(GenerationRequest("again", prompts[1], SamplingParams(max_tokens=30, temperature=0, prompt_logprobs=0)))
    found = {}
    while engine.has_work:
        for output in engine.step():
            if output.prompt_logprobs is not None:
                assert output.request_id not in found
                found[output.request_id] = output.prompt_logprobs
    assert set(found) == {"again", *(str(number) for number in range(1, NUM_PROMPTS, 2))}
    for name, logprobs in found.items():
        prompt = prompts[1 if name == "again" else int(name)]
        with torch.no_grad():
            reference = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        assert logprobs[0] is None and len(logprobs) == len(prompt)
        for position, token in enumerate(logprobs[1:], 1):
            assert token.token_id == prompt[position]
            assert token.logprob == pytest.approx(reference[position - 1, prompt[position]].item(), abs=1e-3)
            best = reference[position - 1].topk(len(token.top))
            assert [token_id for token_id, _ in token.top] == best.indices.tolist()


def test_level_0_is_bit_identical_to_an_engine_without_united_experts(checkpoint: Path, prompts: Prompts) -> None:
    """Not only the tokens: every logit that either engine computes."""
    logits = []
    for brownout in (NO_DIMMING, UNITED):
        engine = make_engine(checkpoint, brownout=brownout)
        recorded = record_logits(engine)
        generate(engine, prompts[:8])
        logits.append(recorded)
    plain, united = logits
    assert len(plain) == len(united) >= NUM_TOKENS
    assert all(torch.equal(a, b) for a, b in zip(plain, united, strict=True))


def record_logits(engine: Engine) -> list[torch.Tensor]:
    """Makes the engine's model keep what its forward pass returns."""
    slot = engine.leave()
    forward, recorded = slot.model.forward, []

    def forward_and_record(batch, kv):  # type: ignore[no-untyped-def]
        output = forward(batch, kv)
        recorded.append(output.logits.clone())
        return output

    slot.model.forward = forward_and_record  # type: ignore[method-assign]
    engine.take_up(slot)
    return recorded
