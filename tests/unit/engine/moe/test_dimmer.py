"""The dimmer's truth table and its promises, over all dimmers: nested, mass kept, consent, protection."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.config import ConfigError
from engine.moe.dimmer import Dimmed, Dimmer
from engine.moe.gate import Routing
from engine.moe.settings import DimmerKind, DimSetting
from engine.types import Phase
from tests.dimming import FAMILIES, SETTINGS, make_dimmer, make_rows, random_routing, setting_id

NUM_EXPERTS = 12
TOP_K = 4
DIMMER = make_dimmer(NUM_EXPERTS, TOP_K)
NO_EXPERT = DIMMER.num_packed
STRONGEST = [setting_id(family[-1]) for family in FAMILIES.values()]

GIVE_BACK = {"piggyback of top 2", "similar of top 3"}  # to a row, what the cut took from it

SEEDS = st.integers(0, 10_000)
SIZES = st.integers(1, 24)
ANY_SETTING = st.integers(1, len(SETTINGS) - 1)
OFTEN = settings(max_examples=60, deadline=None)


def routing_of(seed: int, num_tokens: int, normalise: bool = False) -> Routing:
    return random_routing(seed, num_tokens, NUM_EXPERTS, TOP_K, normalise)


def rewrite(
    routing: Routing, setting: int, dimmer: Dimmer = DIMMER, exact: list[bool] | None = None, prefill: int = 0
) -> Dimmed:
    """All rows decode."""
    phase = torch.full((len(routing.ids),), int(Phase.DECODE))
    rows = make_rows(phase, (prefill, setting), torch.tensor(exact) if exact else None)
    return dimmer.rewrite(0, routing, rows)


def is_dimmed(before: Routing, after: Routing) -> Tensor:
    """[T, A] bool: pairs that no longer go to their own expert."""
    return ~(before.ids[:, :, None] == after.ids[:, None, :]).any(dim=2)


def active(routing: Routing) -> set[int]:
    return set(routing.ids.flatten().tolist()) - {NO_EXPERT}


def test_level_0_changes_nothing() -> None:
    routing = routing_of(0, 9)
    dimmed = rewrite(routing, 0)
    assert torch.equal(dimmed.routing.ids, routing.ids)
    assert torch.equal(dimmed.routing.weights, routing.weights)
    assert dimmed.dimmed_pairs.sum() == 0


@given(seed=SEEDS, num_tokens=SIZES, name=st.sampled_from(sorted(set(FAMILIES) - GIVE_BACK)))
@OFTEN
def test_settings_of_one_dimmer_are_nested(seed: int, num_tokens: int, name: str) -> None:
    """But for those that look for other experts after a cut."""
    routing = routing_of(seed, num_tokens)
    masks = [is_dimmed(routing, rewrite(routing, setting_id(setting)).routing) for setting in FAMILIES[name]]
    for milder, deeper in pairwise(masks):
        assert not (milder & ~deeper).any()


@given(seed=SEEDS, num_tokens=SIZES, setting=ANY_SETTING, normalise=st.booleans())
@OFTEN
def test_routed_mass_is_kept_and_no_expert_comes_twice(
    seed: int, num_tokens: int, setting: int, normalise: bool
) -> None:
    routing = routing_of(seed, num_tokens, normalise)
    after = rewrite(routing, setting).routing
    torch.testing.assert_close(after.weights.sum(1), routing.weights.sum(1))
    assert (after.weights >= 0).all()
    assert (after.weights[after.ids == NO_EXPERT] == 0).all()
    for row in after.ids.tolist():
        real = [expert for expert in row if expert != NO_EXPERT]
        assert len(set(real)) == len(real) >= 1


@given(seed=SEEDS, num_tokens=SIZES, setting=ANY_SETTING)
@OFTEN
def test_no_more_experts_are_active_and_the_count_is_right(seed: int, num_tokens: int, setting: int) -> None:
    routing = routing_of(seed, num_tokens)
    after = rewrite(routing, setting)
    assert len(active(after.routing)) <= len(active(routing))
    assert torch.equal(after.dimmed_pairs, is_dimmed(routing, after.routing).sum(1))


@given(seed=SEEDS, num_tokens=SIZES, setting=ANY_SETTING)
@OFTEN
def test_each_row_keeps_its_best_expert_or_what_stands_for_it(seed: int, num_tokens: int, setting: int) -> None:
    routing = routing_of(seed, num_tokens)
    after = rewrite(routing, setting).routing
    kind = SETTINGS[setting].kind
    for best, now in zip(routing.ids[:, 0].tolist(), after.ids.tolist(), strict=True):
        stands_for = set(DIMMER.united_of[0, :, best].tolist()) if kind in (1, 2) else {best}
        assert stands_for & set(now)


@given(seed=SEEDS, num_tokens=st.integers(2, 24), setting=ANY_SETTING, share=st.floats(0, 1))
@OFTEN
def test_rows_of_class_full_keep_their_experts_and_make_them_hot(
    seed: int, num_tokens: int, setting: int, share: float
) -> None:
    routing = routing_of(seed, num_tokens)
    num_full = round(share * num_tokens)
    exact = [row < num_full for row in range(num_tokens)]
    after = rewrite(routing, setting, exact=exact)
    assert torch.equal(after.routing.ids[:num_full], routing.ids[:num_full])
    assert torch.equal(after.routing.weights[:num_full], routing.weights[:num_full])
    assert after.dimmed_pairs[:num_full].sum() == 0
    if SETTINGS[setting].top_k:
        return  # fewer experts per token save arithmetic, whichever experts are active
    hot = set(routing.ids[:num_full].flatten().tolist())
    for before, now in zip(routing.ids[num_full:].tolist(), after.routing.ids[num_full:].tolist(), strict=True):
        assert hot & set(before) <= set(now)


@given(seed=SEEDS, num_tokens=SIZES, setting=ANY_SETTING)
@OFTEN
def test_protected_experts_are_never_dimmed(seed: int, num_tokens: int, setting: int) -> None:
    routing = routing_of(seed, num_tokens)
    after = rewrite(routing, setting, make_dimmer(NUM_EXPERTS, TOP_K, protected=(2, 7)))
    for before, now in zip(routing.ids.tolist(), after.routing.ids.tolist(), strict=True):
        assert {2, 7} & set(before) <= set(now)


@given(seed=SEEDS, num_tokens=st.integers(2, 24), prefill=ANY_SETTING, decode=st.integers(0, len(SETTINGS) - 1))
@OFTEN
def test_a_mixed_batch_uses_each_rows_own_phase(seed: int, num_tokens: int, prefill: int, decode: int) -> None:
    routing = routing_of(seed, num_tokens)
    phase = torch.arange(num_tokens) % 2
    is_prefill = phase == int(Phase.PREFILL)
    after = DIMMER.rewrite(0, routing, make_rows(phase, (prefill, decode)))
    torch.testing.assert_close(after.routing.weights.sum(1), routing.weights.sum(1))
    if decode == 0:
        assert torch.equal(after.routing.ids[~is_prefill], routing.ids[~is_prefill])
        assert torch.equal(after.routing.weights[~is_prefill], routing.weights[~is_prefill])
    # What a phase does depends on the other one only through the experts that it keeps active.
    swapped = DIMMER.rewrite(0, routing, make_rows(1 - phase, (decode, prefill)))
    assert torch.equal(after.routing.ids, swapped.routing.ids)


@given(seed=SEEDS, num_tokens=SIZES, num_padding=st.integers(1, 8), setting=ANY_SETTING)
@OFTEN
def test_padding_rows_count_for_nothing(seed: int, num_tokens: int, num_padding: int, setting: int) -> None:
    routing = routing_of(seed, num_tokens + num_padding)
    short = Routing(routing.ids[:num_tokens], routing.weights[:num_tokens], routing.probs[:num_tokens])  # type: ignore[index]
    phase = torch.ones(num_tokens + num_padding, dtype=torch.int64)
    valid = torch.arange(num_tokens + num_padding) < num_tokens
    padded = DIMMER.rewrite(0, routing, make_rows(phase, (0, setting), valid=valid))
    alone = rewrite(short, setting)
    assert torch.equal(padded.routing.ids[:num_tokens], alone.routing.ids)
    torch.testing.assert_close(padded.routing.weights[:num_tokens], alone.routing.weights)
    assert (padded.routing.ids[num_tokens:] == NO_EXPERT).all()
    assert padded.dimmed_pairs[num_tokens:].sum() == 0


@pytest.mark.parametrize("setting", range(len(SETTINGS)))
def test_what_the_host_knows_changes_nothing(setting: int) -> None:
    routing = routing_of(1, 16)
    rows = make_rows(torch.arange(16) % 2, (setting, len(SETTINGS) - 1 - setting))
    known, unknown = (DIMMER.rewrite(0, routing, r) for r in (rows, replace(rows, host_levels=None)))
    assert torch.equal(known.routing.ids, unknown.routing.ids)
    assert torch.equal(known.routing.weights, unknown.routing.weights)


@pytest.mark.parametrize("way", [2, 4])
def test_at_share_1_each_group_is_one_united_expert(way: int) -> None:
    after = rewrite(routing_of(0, 24), setting_id(DimSetting(DimmerKind.UNITED, way=way, share=1.0)))
    assert active(after.routing) == set(DIMMER.united_of[0, {2: 1, 4: 2}[way]].tolist())


def test_an_only_cold_expert_of_its_group_stays() -> None:
    # Experts 0, 4, 8 are in different groups of both ways: nothing would be saved.
    routing = Routing(torch.tensor([[0, 4, 8]]), torch.tensor([[0.5, 0.3, 0.2]]))
    assert rewrite(routing, setting_id(FAMILIES["4-way"][-1])).dimmed_pairs.item() == 0


def test_pairs_that_meet_in_one_united_expert_become_one() -> None:
    routing = Routing(torch.tensor([[0, 1, 4, 5]]), torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    after = rewrite(routing, setting_id(FAMILIES["2-way"][-1]))
    first, third = NUM_EXPERTS, NUM_EXPERTS + 2
    assert after.routing.ids.tolist() == [[first, NO_EXPERT, third, NO_EXPERT]]
    torch.testing.assert_close(after.routing.weights, torch.tensor([[0.7, 0.0, 0.3, 0.0]]))
    assert after.dimmed_pairs.item() == 4


@pytest.mark.parametrize(("family", "kept"), [("4-way", 0), ("paper", 1)])
def test_united_ranks_by_mass_and_paper_by_count(family: str, kept: int) -> None:
    # Expert 0: one heavy pair (mass .9, count 1). Expert 1: three light ones (mass .3, count 3).
    routing = Routing(
        torch.tensor([[0, 2], [1, 3], [1, 2], [1, 3]]),
        torch.tensor([[0.9, 0.05], [0.1, 0.05], [0.1, 0.05], [0.1, 0.05]]),
    )
    ids = rewrite(routing, setting_id(FAMILIES[family][2])).routing.ids  # b = 0.75
    assert kept in ids.flatten().tolist()
    assert 1 - kept not in ids.flatten().tolist()


def probabilities(*rows: dict[int, float]) -> Routing:
    """Rows with two experts each, by hand."""
    probs = torch.zeros(len(rows), NUM_EXPERTS)
    for index, row in enumerate(rows):
        probs[index, list(row)] = torch.tensor(list(row.values()))
    weights, ids = probs.topk(2, dim=1)
    return Routing(ids, weights, probs)


def test_piggyback_repicks_the_likeliest_active_expert() -> None:
    # Row 0 keeps 3 and leaves 5, which no row keeps; of the active 3 and 7 it had 3 already.
    routing = probabilities({3: 0.5, 5: 0.3, 7: 0.1, 9: 0.15}, {7: 0.6, 3: 0.2})
    after = rewrite(routing, setting_id(DimSetting(DimmerKind.PIGGYBACK, keep=1)))
    assert after.routing.ids.tolist() == [[3, 7], [7, 3]]
    torch.testing.assert_close(after.routing.weights, torch.tensor([[0.8 * 5 / 6, 0.8 / 6], [0.6, 0.2]]))
    assert after.dimmed_pairs.tolist() == [1, 0]


def test_a_budget_keeps_the_experts_with_the_largest_mass() -> None:
    budget = DimSetting(DimmerKind.PIGGYBACK, keep=1, budget=4)
    routing = probabilities({0: 0.5, 4: 0.3}, {1: 0.5, 4: 0.3}, {2: 0.5, 5: 0.2}, {0: 0.4, 5: 0.3})
    after = rewrite(routing, setting_id(budget)).routing
    assert active(after) == {0, 1, 2, 4}  # 4 has mass .6, 5 has .5


def test_topk_shares_the_weight_of_what_is_left_out() -> None:
    routing = Routing(torch.tensor([[3, 5, 7, 9]]), torch.tensor([[0.4, 0.2, 0.1, 0.1]]))
    after = rewrite(routing, setting_id(DimSetting(DimmerKind.TOPK, top_k=(2,))))
    assert after.routing.ids.tolist() == [[3, 5, NO_EXPERT, NO_EXPERT]]
    torch.testing.assert_close(after.routing.weights, torch.tensor([[0.8 * 2 / 3, 0.8 / 3, 0.0, 0.0]]))
    assert after.dimmed_pairs.item() == 2


def test_topk_can_differ_by_layer() -> None:
    settings = [DimSetting(), DimSetting(DimmerKind.TOPK, top_k=(4, 1))]
    dimmer = Dimmer(settings, 0, torch.zeros(2, NUM_EXPERTS, dtype=torch.bool), TOP_K, torch.device("cpu"))
    routing, rows = routing_of(0, 3), make_rows(torch.ones(3, dtype=torch.int64), (0, 1))
    assert dimmer.rewrite(0, routing, rows).dimmed_pairs.sum() == 0
    assert dimmer.rewrite(1, routing, rows).dimmed_pairs.tolist() == [3, 3, 3]


def test_similar_sends_a_pair_to_the_most_similar_kept_expert() -> None:
    similarity = torch.full((1, NUM_EXPERTS, NUM_EXPERTS), 0.1)
    similarity[0, 5, 7] = 0.9
    setting = DimSetting(DimmerKind.SIMILAR, keep=1, min_similarity=0.5)
    dimmer = Dimmer(
        [DimSetting(), setting], 0, torch.zeros(1, NUM_EXPERTS, dtype=torch.bool), 2, torch.device("cpu"), similarity
    )
    routing = Routing(torch.tensor([[3, 5], [7, 9]]), torch.tensor([[0.6, 0.4], [0.7, 0.3]]))
    after = dimmer.rewrite(0, routing, make_rows(torch.ones(2, dtype=torch.int64), (0, 1)))
    assert after.routing.ids.tolist() == [[3, 7], [7, 9]]  # nothing is like 9
    assert after.dimmed_pairs.tolist() == [1, 0]


def test_settings_that_cannot_work_are_refused() -> None:
    dimmer = make_dimmer(NUM_EXPERTS, TOP_K)
    for setting, complaint in (
        (DimSetting(DimmerKind.TOPK, top_k=(5,)), r"top_k \[5\]; allowed: 1 to 4"),
        (DimSetting(DimmerKind.TOPK, top_k=(1, 2, 3)), "once or for each of 2 layers"),
        (DimSetting(DimmerKind.PIGGYBACK, keep=5), "keep 5"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            dimmer.set_settings([DimSetting(), setting])
    dimmer.similarity = None
    with pytest.raises(ConfigError, match=r"needs brownout\.similarity"):
        dimmer.set_settings([DimSetting(), DimSetting(DimmerKind.SIMILAR, keep=1)])


def test_settings_can_be_replaced_in_place() -> None:
    dimmer = make_dimmer(NUM_EXPERTS, TOP_K)
    table = dimmer.share
    dimmer.set_settings([DimSetting(), DimSetting(DimmerKind.UNITED, way=2, share=1.0)])
    assert dimmer.share is table
    routing = routing_of(0, 24)
    expected = rewrite(routing, setting_id(FAMILIES["2-way"][-1]))
    assert torch.equal(rewrite(routing, 1, dimmer).routing.ids, expected.routing.ids)


def test_captured_kernels_are_asked_for_nothing_they_were_not_compiled_for() -> None:
    united = FAMILIES["2-way"]
    dimmer = make_dimmer(8, 2, settings=[DimSetting(), *united])
    dimmer.compile_for(everything=False)
    dimmer.set_settings([DimSetting(), united[0], DimSetting(DimmerKind.UNITED, way=4, share=1.0)])
    for other in (DimSetting(DimmerKind.PIGGYBACK, keep=1), DimSetting(DimmerKind.UNITED, way=2, share=1, top_k=(1,))):
        with pytest.raises(ConfigError, match="allowed while serving: exact, united without a top_k"):
            dimmer.set_settings([DimSetting(), other])
    dimmer.compile_for(everything=True)
    dimmer.set_settings([DimSetting(), DimSetting(DimmerKind.TOPK, top_k=(1,))])
    assert dimmer.kinds == frozenset(DimmerKind) and dimmer.cuts
