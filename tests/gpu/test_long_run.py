"""Thousands of steps of mixed traffic: no memory, no block and no request is left behind, and no token drifts."""

from __future__ import annotations

import gc
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import CacheConfig, SchedulerConfig
from engine.engine import Engine
from engine.types import BrownoutSetting, GenerationRequest, SamplingParams, ServiceClass
from tests.gpu.engines import UNITED, make_engine

pytestmark = pytest.mark.gpu

NUM_ROUNDS = 45
NUM_SETTLING_ROUNDS = 10  # until every shape has been seen and the prefix cache is full
MIN_STEPS = 3000
PROBE = GenerationRequest(
    "probe", tuple(range(100, 140)), SamplingParams(max_tokens=48, temperature=0, ignore_eos=True), ServiceClass.FULL
)
LEVELS = (0, 2, 4)
SAMPLING = (
    {"temperature": 0},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 40, "repetition_penalty": 1.2, "logprobs": 2},
)


def test_a_long_run_leaks_nothing_and_drifts_nowhere(gpu: torch.device, checkpoint: Path) -> None:
    engine = make_engine(
        checkpoint,
        UNITED,
        scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=128),
        cache=CacheConfig(num_blocks=110),  # few enough to evict and to preempt
    )
    rng = random.Random(0)
    answers, allocated, reserved = [], [], []
    for number in range(NUM_ROUNDS):
        setting = BrownoutSetting.pinned(LEVELS[number % len(LEVELS)])
        assert engine.apply_setting(replace(setting, version=number + 1))
        answers.append(serve(engine, [PROBE, *(traffic(rng, f"{number}-{i}") for i in range(24))]))
        assert engine.scheduler.blocks.num_used == 0
        engine.scheduler.blocks.check_invariants()
        gc.collect()
        torch.cuda.synchronize()
        allocated.append(torch.cuda.memory_allocated())
        reserved.append(torch.cuda.memory_reserved())
    assert engine.stats().num_steps >= MIN_STEPS
    assert len(answers[0]) == PROBE.sampling.max_tokens
    assert all(answer == answers[0] for answer in answers)
    for taken in (allocated, reserved):
        assert max(taken[NUM_SETTLING_ROUNDS:]) <= max(taken[:NUM_SETTLING_ROUNDS])


def traffic(rng: random.Random, request_id: str) -> GenerationRequest:
    prompt = tuple(rng.randrange(4096) for _ in range(rng.choice((1, 7, 30, 100, 200))))
    options = rng.choice(SAMPLING)
    return GenerationRequest(
        request_id, prompt, SamplingParams(max_tokens=rng.choice((1, 20, 60)), ignore_eos=True, **options)
    )


def serve(engine: Engine, requests: list[GenerationRequest]) -> list[int]:
    """Until all have ended; the first one's tokens."""
    for request in requests:
        engine.add(request)
    token_ids: list[int] = []
    while engine.has_work:
        for output in engine.step():
            if output.request_id == requests[0].request_id:
                token_ids += output.token_ids
    return token_ids
