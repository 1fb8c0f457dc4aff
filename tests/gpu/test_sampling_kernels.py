"""Truncated draws without a sort against ranking the whole vocabulary, and sampled requests on the card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.sampling.draw import Columns, draw_among
from engine.sampling.state import SamplingState
from engine.types import GenerationRequest, SamplingParams
from tests.gpu.engines import UNDIMMED, make_engine

pytest.importorskip("triton")
sampling_kernels = pytest.importorskip("engine.sampling.kernels")

pytestmark = pytest.mark.gpu

VOCAB = 700
OPTIONS = [{"top_p": 0.3}, {"top_p": 0.999}, {"top_k": 1}, {"top_k": 40}, {"top_k": 400, "top_p": 0.6}, {"top_p": 1e-9}]


@pytest.mark.parametrize("num_weights", [3, 5000])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_draws_without_a_sort_equal_the_ranked_ones(
    kernel_device: torch.device, options: dict[str, float], num_weights: int
) -> None:
    """Weights are multiples of 2**-13, so that sums are exact in any order; with few of them most are ties."""
    generator = torch.Generator().manual_seed(num_weights)
    weights = torch.randint(0, num_weights, (24, VOCAB), generator=generator).float() / 8192
    weights[:, 11] = 1
    states = [SamplingState(SamplingParams(**options, seed=i), (), VOCAB, frozenset(), i) for i in range(len(weights))]  # type: ignore[arg-type]
    columns = Columns.of(states, VOCAB, weights.device)
    expected, complete = draw_among(weights, weights.sum(-1, keepdim=True), columns, VOCAB)
    assert complete.all()
    finished = torch.arange(len(weights)) % 3 == 0
    tokens = torch.full((len(weights),), -1)
    tokens, finished, weights = (x.to(kernel_device) for x in (tokens, finished, weights))
    told = (column.to(kernel_device) for column in (columns.top_k, columns.top_p, columns.draws))
    sampling_kernels.draw_incomplete_(tokens, finished, weights, *told)
    finished, tokens = finished.cpu(), tokens.cpu()
    assert torch.equal(tokens[~finished], expected[~finished])
    assert (tokens[finished] == -1).all()


def test_sampled_requests_overlap_and_get_the_same_tokens(gpu: torch.device, checkpoint: Path) -> None:
    """Whole vocabularies, sets small and large, penalties, log-probabilities, and min_tokens, beside a greedy one."""
    options: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 2.0, "top_p": 0.99},
        {"temperature": 0.7, "top_k": 20, "min_p": 0.02},
        {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"temperature": 0, "logprobs": 3, "min_tokens": 5, "stop_token_ids": (7, 8)},
    ]
    answers, steps_ahead = [], []
    for overlap_steps in (False, True):
        engine = make_engine(checkpoint, UNDIMMED, overlap_steps=overlap_steps)
        for index, given in enumerate(options):
            sampling = SamplingParams(max_tokens=40, ignore_eos=True, seed=index, **given)
            engine.add(GenerationRequest(str(index), tuple(range(50 + index, 80)), sampling))
        found: dict[str, list[int]] = {str(index): [] for index in range(len(options))}
        outputs = engine.step()
        steps_ahead.append(not outputs)
        while outputs or engine.has_work:
            for output in outputs:
                found[output.request_id] += output.token_ids
            outputs = engine.step()
        answers.append(found)
    assert steps_ahead == [False, True]
    assert answers[0] == answers[1]
