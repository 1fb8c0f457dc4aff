"""Counting experts: what the counter says is what the layers routed, exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.moe.load import ExpertCounter, summarise

CPU = torch.device("cpu")


def test_counts_and_active_experts_by_layer() -> None:
    """Layer 5 has four experts, layer 2 two: there an id of 2 means no expert."""
    counter = ExpertCounter({2: 2, 5: 4}, CPU)
    for _ in range(2):
        counter.count_(2, torch.tensor([[0, 2], [2, 2]], dtype=torch.int32))
        counter.count_(5, torch.tensor([[3, 1], [3, 4], [3, 3]]))
        counter.end_step_()
    assert counter.take() is None, "the first call only starts the copy"
    seen = counter.take()
    assert seen is not None
    assert (seen.layer, seen.active_experts, seen.num_hot) == ((2, 5), (1.0, 2.0), 4)
    assert seen.balance_index[0] == pytest.approx(1 / 2)
    assert (seen.hot_expert[0], seen.hot_share[0]) == (0, 1.0)
    assert (seen.hot_expert[4:6], seen.hot_share[4:]) == ((3, 1), (0.8, 0.2, 0.0, 0.0))
    assert counter.take() is None, "no step since"


def test_each_step_is_told_once() -> None:
    counter = ExpertCounter({0: 3}, CPU)
    told = []
    for expert in (0, 1, 1, None):
        if expert is not None:
            counter.count_(0, torch.tensor([[expert]]))
            counter.end_step_()
        told.append(counter.take())
    assert told[0] is None
    assert [seen.hot_expert[0] for seen in told if seen is not None] == [0, 1, 1]


def test_balance_index() -> None:
    pairs = np.array([[5, 5, 5, 5], [20, 0, 0, 0]])
    seen = summarise((0, 1), pairs, np.array([8, 2]), np.array([4, 4]), num_steps=2)
    assert seen.balance_index == (1.0, 0.25)
    assert seen.active_experts == (4.0, 1.0)


def test_kernels_may_add_to_the_totals_themselves() -> None:
    counter = ExpertCounter({2: 2, 5: 4}, CPU)
    for _ in range(2):
        counter.totals(5)[:4] += torch.tensor([0, 1, 0, 3])
        counter.totals(5)[-1] += 2
        counter.note_step()
    counter.take()
    seen = counter.take()
    assert seen is not None
    assert seen.active_experts == (0.0, 2.0)
    assert (seen.hot_expert[4:6], seen.hot_share[4:6]) == ((3, 1), (0.75, 0.25))
