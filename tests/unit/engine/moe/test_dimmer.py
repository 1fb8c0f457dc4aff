"""The dimmer's truth table and its promises: nested levels, kept mass, consent, protection."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import RowInfo
from engine.moe.dimmer import Dimmed, Dimmer
from engine.moe.gate import Routing
from engine.moe.ladder import Ladder, Level
from engine.moe.united import consecutive_groups
from engine.types import Phase
from tests.united import map_united

NUM_EXPERTS = 12
TOP_K = 4
SHARES = (0.25, 0.5, 0.75, 1.0)
LADDER = Ladder((Level(), *(Level(2, b) for b in SHARES), *(Level(4, b) for b in SHARES)))
GROUPINGS = (consecutive_groups(NUM_EXPERTS, 2), consecutive_groups(NUM_EXPERTS, 4))
NUM_UNITED = sum(len(grouping.groups) for grouping in GROUPINGS)
NO_EXPERT = NUM_EXPERTS + NUM_UNITED


def make_dimmer(protected: tuple[int, ...] = (), rank_by_count: bool = False) -> Dimmer:
    mask = torch.zeros(1, NUM_EXPERTS, dtype=torch.bool)
    mask[0, list(protected)] = True
    dimmer = Dimmer(LADDER, NUM_UNITED, mask, rank_by_count, torch.device("cpu"))
    map_united(dimmer.united_of, GROUPINGS)
    return dimmer


def random_routing(seed: int, num_tokens: int) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).softmax(-1)
    weights, ids = probs.topk(TOP_K, dim=-1)
    return Routing(ids, weights)


def rewrite(
    routing: Routing, level: int, dimmer: Dimmer | None = None, exact: list[bool] | None = None, prefill_level: int = 0
) -> Dimmed:
    num_tokens = routing.ids.shape[0]
    rows = RowInfo(
        phase=torch.full((num_tokens,), int(Phase.DECODE)),
        exact=torch.tensor(exact or [False] * num_tokens),
        valid=torch.ones(num_tokens, dtype=torch.bool),
        levels=torch.tensor([prefill_level, level]),
    )
    return (dimmer or make_dimmer()).rewrite(0, routing, rows)


def dimmed_mask(routing: Routing, level: int) -> torch.Tensor:
    """[T, A] bool: pairs that no longer go to their own expert."""
    after = rewrite(routing, level).routing
    kept = (routing.ids[:, :, None] == after.ids[:, None, :]).any(dim=2)
    return ~kept


def test_level_0_changes_nothing() -> None:
    routing = random_routing(0, 9)
    dimmed = rewrite(routing, 0)
    assert torch.equal(dimmed.routing.ids, routing.ids)
    assert torch.equal(dimmed.routing.weights, routing.weights)
    assert dimmed.dimmed_pairs.sum() == 0


@given(seed=st.integers(0, 10_000), num_tokens=st.integers(1, 24), first=st.sampled_from([1, 5]))
@settings(max_examples=60, deadline=None)
def test_levels_of_one_way_are_nested(seed: int, num_tokens: int, first: int) -> None:
    routing = random_routing(seed, num_tokens)
    masks = [dimmed_mask(routing, level) for level in range(first, first + len(SHARES))]
    for milder, deeper in pairwise(masks):
        assert not (milder & ~deeper).any()


@given(seed=st.integers(0, 10_000), num_tokens=st.integers(1, 24), level=st.integers(0, 8))
@settings(max_examples=60, deadline=None)
def test_routed_mass_is_kept_and_no_expert_comes_twice(seed: int, num_tokens: int, level: int) -> None:
    routing = random_routing(seed, num_tokens)
    after = rewrite(routing, level).routing
    torch.testing.assert_close(after.weights.sum(1), routing.weights.sum(1))
    assert (after.weights[after.ids == NO_EXPERT] == 0).all()
    for row in after.ids.tolist():
        real = [expert for expert in row if expert != NO_EXPERT]
        assert len(set(real)) == len(real) >= 1


@given(seed=st.integers(0, 10_000), num_tokens=st.integers(2, 24), level=st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_fewer_experts_are_active(seed: int, num_tokens: int, level: int) -> None:
    routing = random_routing(seed, num_tokens)
    after = rewrite(routing, level)
    active = set(after.routing.ids.flatten().tolist()) - {NO_EXPERT}
    assert len(active) <= len(set(routing.ids.flatten().tolist()))
    if level in (4, 8) and num_tokens > 12:  # b = 1: one expert a group, all experts being active
        way = 2 if level == 4 else 4
        assert len(active) == NUM_EXPERTS // way


def test_full_class_rows_keep_their_experts_and_make_them_hot() -> None:
    routing = random_routing(3, 16)
    exact = [row < 3 for row in range(16)]
    after = rewrite(routing, 8, exact=exact)
    assert torch.equal(after.routing.ids[:3], routing.ids[:3])
    assert torch.equal(after.routing.weights[:3], routing.weights[:3])
    assert after.dimmed_pairs[:3].sum() == 0
    assert after.dimmed_pairs[3:].sum() > 0
    hot = set(routing.ids[:3].flatten().tolist())
    for before, now in zip(routing.ids[3:].tolist(), after.routing.ids[3:].tolist(), strict=True):
        assert hot & set(before) <= set(now)


def test_protected_experts_are_never_dimmed() -> None:
    routing = random_routing(4, 16)
    after = rewrite(routing, 8, make_dimmer(protected=(2, 7)))
    for before, now in zip(routing.ids.tolist(), after.routing.ids.tolist(), strict=True):
        assert {2, 7} & set(before) <= set(now)


def test_an_only_cold_expert_of_its_group_stays() -> None:
    # Experts 0, 4, 8 are in different groups of both ways: nothing would be saved.
    routing = Routing(torch.tensor([[0, 4, 8]]), torch.tensor([[0.5, 0.3, 0.2]]))
    assert rewrite(routing, 8).dimmed_pairs.item() == 0


def test_pairs_that_meet_in_one_united_expert_become_one() -> None:
    routing = Routing(torch.tensor([[0, 1, 4, 5]]), torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    after = rewrite(routing, 4)  # 2-way, b = 1
    first, third = NUM_EXPERTS, NUM_EXPERTS + 2
    assert after.routing.ids.tolist() == [[first, NO_EXPERT, third, NO_EXPERT]]
    torch.testing.assert_close(after.routing.weights, torch.tensor([[0.7, 0.0, 0.3, 0.0]]))
    assert after.dimmed_pairs.item() == 4


@pytest.mark.parametrize(("rank_by_count", "kept"), [(False, 0), (True, 1)])
def test_united_ranks_by_mass_and_paper_by_count(rank_by_count: bool, kept: int) -> None:
    # Expert 0: one heavy pair (mass .9, count 1). Expert 1: three light ones (mass .3, count 3).
    routing = Routing(
        torch.tensor([[0, 2], [1, 3], [1, 2], [1, 3]]),
        torch.tensor([[0.9, 0.05], [0.1, 0.05], [0.1, 0.05], [0.1, 0.05]]),
    )
    ids = rewrite(routing, 7, make_dimmer(rank_by_count=rank_by_count)).routing.ids  # 4-way, b = 0.75
    assert kept in ids.flatten().tolist()
    assert 1 - kept not in ids.flatten().tolist()


def test_a_mixed_batch_uses_each_rows_own_phase() -> None:
    routing = random_routing(5, 12)
    rows = RowInfo(
        phase=torch.tensor([int(Phase.DECODE)] * 6 + [int(Phase.PREFILL)] * 6),
        exact=torch.zeros(12, dtype=torch.bool),
        valid=torch.ones(12, dtype=torch.bool),
        levels=torch.tensor([0, 8]),
    )
    after = make_dimmer().rewrite(0, routing, rows)
    assert torch.equal(after.routing.ids[6:], routing.ids[6:])
    assert after.dimmed_pairs[6:].sum() == 0
