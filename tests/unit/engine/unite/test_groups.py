"""Groupings are balanced, deterministic and find the structure that is there."""

from __future__ import annotations

import pytest
import torch

from engine.unite.groups import balanced_groups, coactivation, make_grouping
from engine.unite.pairs import LayerTrace


@pytest.mark.parametrize(("num_experts", "way"), [(60, 2), (60, 4), (60, 8), (10, 4), (4, 4)])
def test_groups_are_balanced_and_hold_every_expert_once(num_experts: int, way: int) -> None:
    affinity = torch.rand(num_experts, num_experts, generator=torch.Generator().manual_seed(way))
    groups = balanced_groups(affinity + affinity.t(), way).groups
    assert sorted(expert for members in groups for expert in members) == list(range(num_experts))
    sizes = sorted(map(len, groups))
    assert sizes[-1] <= way and sizes[-1] - sizes[0] <= 1
    assert balanced_groups(affinity + affinity.t(), way).groups == groups


def test_planted_groups_are_found() -> None:
    planted = [(0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)]
    affinity = torch.zeros(16, 16)
    for members in planted:
        for expert in members:
            affinity[expert, list(members)] = 1.0
    assert balanced_groups(affinity, 4).groups == tuple(planted)


def test_coactivation_counts_tokens_that_chose_both() -> None:
    ids = torch.tensor([[0, 1], [1, 0], [2, 1]])
    trace = LayerTrace(torch.zeros(3, 4, 2), torch.zeros(3, 2, 2), torch.zeros(3, 2), ids, torch.ones(3, 2))
    assert coactivation(trace).tolist() == [[2, 2, 0], [2, 3, 1], [0, 1, 1]]


def test_similar_experts_share_a_group() -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up, down = torch.randn(2, 8, 6, generator=generator), torch.randn(2, 6, 4, generator=generator)
    inputs = torch.randn(50, 6, generator=generator)
    ids, weights = torch.zeros(50, 1, dtype=torch.int64), torch.ones(50, 1)
    which = [0, 1, 1, 0]
    trace = LayerTrace(gate_up[which], down[which], inputs, ids, weights)
    assert make_grouping("similar", 2, trace).groups == ((0, 3), (1, 2))
