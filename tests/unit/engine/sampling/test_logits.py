"""Edits of many rows at once equal the same edits one row at a time; seen tokens are counted like a Counter."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from engine.sampling.logits import SeenTokens, edit_
from engine.sampling.state import SamplingState
from engine.types import SamplingParams

VOCAB = 300


@pytest.mark.parametrize("num_prompt", [0, 1, 500])
def test_seen_tokens_count_the_output_and_know_the_prompt(num_prompt: int) -> None:
    rng = random.Random(num_prompt)
    prompt = [rng.randrange(VOCAB) for _ in range(num_prompt)]
    output = [rng.randrange(VOCAB) for _ in range(700)]
    seen = SeenTokens(prompt)
    for token_id in output:
        seen.append(token_id)
    counted = Counter(output)
    assert len(seen.ids) == len(set(seen.ids.tolist()))
    found = dict(zip(seen.ids.tolist(), seen.counts.tolist(), strict=True))
    assert found == {token_id: counted[token_id] for token_id in {*prompt, *output}}


def test_rows_do_not_touch_each_other() -> None:
    options = [
        {"logit_bias": ((3, 5.0), (7, -100.0))},
        {"repetition_penalty": 1.5, "presence_penalty": 0.5},
        {"min_tokens": 3},
        {"frequency_penalty": -1.0, "logit_bias": ((3, 1.0),), "min_tokens": 2},
        {"presence_penalty": 2.0},
        {"allowed_token_ids": (5, 9, 11), "min_tokens": 3},
    ]
    states = [
        SamplingState(SamplingParams(**given), (1, 2, 3), VOCAB, frozenset({9, 10, VOCAB}), number)  # type: ignore[arg-type]
        for number, given in enumerate(options)
    ]
    for state in states:
        state.append(3)
        state.append(5)
    logits = torch.randn(2 * len(states), VOCAB, generator=torch.Generator().manual_seed(0))
    together = logits.clone()
    edit_(together, [state.edits(2 * row) for row, state in enumerate(states)])
    for row, state in enumerate(states):
        alone = logits[2 * row : 2 * row + 1].clone()
        edit_(alone, [state.edits(0)])
        assert torch.equal(together[2 * row], alone[0])
        assert not torch.equal(together[2 * row], logits[2 * row])
        assert torch.equal(together[2 * row + 1], logits[2 * row + 1])  # a row that asks for nothing
