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
    assert counter.take() == (), "the first call only starts the copy"
    narrow, wide = counter.take()
    assert (narrow.layer, narrow.active_experts, narrow.hot) == (2, 1.0, ((0, 1.0),))
    assert narrow.balance_index == pytest.approx(1 / 2)
    assert (wide.layer, wide.active_experts, wide.hot) == (5, 2.0, ((3, 0.8), (1, 0.2)))
    assert counter.take() == (), "no step since"


def test_each_step_is_told_once() -> None:
    counter = ExpertCounter({0: 3}, CPU)
    told = []
    for expert in (0, 1, 1):
        counter.count_(0, torch.tensor([[expert]]))
        counter.end_step_()
        told += [layer.hot for layer in counter.take()]
    told += [layer.hot for layer in counter.take()]
    assert told == [((0, 1.0),), ((1, 1.0),), ((1, 1.0),)]


def test_balance_index() -> None:
    pairs = np.array([[5, 5, 5, 5], [20, 0, 0, 0]])
    even, skewed = summarise((0, 1), pairs, np.array([8, 2]), np.array([4, 4]), num_steps=2)
    assert (even.balance_index, even.active_experts) == (1.0, 4.0)
    assert (skewed.balance_index, skewed.active_experts) == (0.25, 1.0)
