"""Which experts a united expert stands for: balanced groups that maximise an affinity between their members.

Three choices (notes of the field disagree on the best; `build` keeps the one with the lowest held-out routed error):

| grouping    | members of a group ...                                                             |
| ----------- | ---------------------------------------------------------------------------------- |
| consecutive | are neighbours by index                                                            |
| apart       | are seldom chosen by the same token, so a united expert can tell by its input which one is meant |
| similar     | give similar outputs on common inputs (BrownoutMoE, arXiv 2607.04164)              |
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.moe.experts import PackedExperts
from engine.moe.similarity import output_similarity
from engine.moe.united import Grouping, consecutive_groups
from engine.unite.pairs import LayerTrace

GROUPINGS = ("consecutive", "apart", "similar")
NUM_SIMILARITY_TOKENS = 256


def make_grouping(name: str, way: int, trace: LayerTrace) -> Grouping:
    """The grouping called ``name``; each is deterministic."""
    if name == "consecutive":
        return consecutive_groups(trace.num_experts, way)
    affinity = -coactivation(trace) if name == "apart" else similarity(trace)
    return balanced_groups(affinity, way)


def coactivation(trace: LayerTrace) -> Tensor:
    """[E, E]: how many tokens chose both experts."""
    chosen = torch.zeros(trace.inputs.shape[0], trace.num_experts, device=trace.ids.device)
    chosen.scatter_(1, trace.ids, 1.0)
    return chosen.t() @ chosen


@torch.no_grad()
def similarity(trace: LayerTrace) -> Tensor:
    """[E, E]: cosine of the experts' outputs on the same tokens, averaged over tokens."""
    stride = max(1, trace.inputs.shape[0] // NUM_SIMILARITY_TOKENS)
    experts = PackedExperts(trace.gate_up, trace.down, trace.num_experts)
    return output_similarity(experts, trace.inputs[::stride][:NUM_SIMILARITY_TOKENS])


def balanced_groups(affinity: Tensor, way: int) -> Grouping:
    """Starts from neighbours and swaps the two experts that gain most affinity within groups until none gains.

    affinity [E, E], symmetric. Group sizes stay those of `consecutive_groups`.
    """
    num_experts = affinity.shape[0]
    start = consecutive_groups(num_experts, way)
    affinity = affinity.double().cpu().clone().fill_diagonal_(0.0)
    group_of = torch.empty(num_experts, dtype=torch.int64)
    for group, members in enumerate(start.groups):
        group_of[list(members)] = group
    smallest_gain = 1e-9 * float(affinity.abs().sum())
    while True:
        member = torch.nn.functional.one_hot(group_of, len(start.groups)).double()  # [E, G]
        to_group = affinity @ member  # [E, G] affinity of expert to group
        to_others = to_group[:, group_of]  # [E, E] of expert i to the group of j
        own = to_group.gather(1, group_of[:, None])  # [E, 1]
        gain = to_others + to_others.t() - own - own.t() - 2 * affinity
        gain[group_of[:, None] == group_of[None, :]] = 0.0
        best = int(gain.argmax())
        if float(gain.flatten()[best]) <= smallest_gain:
            break
        first, second = divmod(best, num_experts)
        group_of[[first, second]] = group_of[[second, first]]
    groups = [tuple((group_of == group).nonzero().flatten().tolist()) for group in range(len(start.groups))]
    return Grouping(way, tuple(sorted(groups)))
