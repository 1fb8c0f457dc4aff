"""Builds of the literature, for comparison only: averages of weights, and distillation on the mixture of outputs.

Legend: G groups, E experts, B tokens per step, D hidden size, F expert FFN width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.moe.united import Grouping
from engine.unite.distil import DistilOptions, Sample, train
from engine.unite.pairs import LayerTrace, RoutedPairs, expert_hidden
from engine.unite.united_layer import UnitedLayer


def average(trace: LayerTrace, grouping: Grouping) -> UnitedLayer:
    """The plain average of the members' weights."""
    return _weighted_average(trace, grouping, torch.ones(trace.num_experts, device=trace.ids.device))


def frequency_average(trace: LayerTrace, pairs: RoutedPairs, grouping: Grouping) -> UnitedLayer:
    """The average weighted by how many tokens chose each member."""
    return _weighted_average(trace, grouping, _num_tokens(pairs))


def mixture_distil(trace: LayerTrace, pairs: RoutedPairs, grouping: Grouping, options: DistilOptions) -> UnitedLayer:
    """The published recipe (arXiv 2507.17133, 2607.04164): fit the members' mean output on *all* tokens.

    Starts from the frequency average, weights the members by frequency, and takes as many steps and examples as the
    routed distillation.
    """
    num_groups = len(grouping.groups)
    num_tokens = max(1, options.num_tokens * trace.ids.shape[1] // num_groups)
    generator = torch.Generator(trace.ids.device).manual_seed(options.seed)
    mixture = _membership(grouping, _num_tokens(pairs))  # [G, E]

    def draw() -> Sample:
        count = trace.inputs.shape[0]
        chosen = torch.randint(count, (num_tokens,), generator=generator, device=trace.ids.device)
        x = trace.inputs[chosen].expand(trace.num_experts, -1, -1)
        with torch.no_grad():
            outputs = expert_hidden(trace.gate_up, x) @ trace.down.mT  # [E, B, D]
            targets = torch.einsum("ge,ebd->gbd", mixture.to(outputs.dtype), outputs)
        return Sample(x[:num_groups], targets, torch.ones(num_groups, num_tokens, device=x.device))

    return train(frequency_average(trace, pairs, grouping), draw, options)


def _weighted_average(trace: LayerTrace, grouping: Grouping, weights: Tensor) -> UnitedLayer:
    mixture = _membership(grouping, weights)  # [G, E]
    gate_up, down = (
        torch.einsum("ge,eab->gab", mixture, table.float()).to(table.dtype) for table in (trace.gate_up, trace.down)
    )
    return UnitedLayer(grouping, gate_up, down)


def _membership(grouping: Grouping, weights: Tensor) -> Tensor:
    """[G, E]: the weights of each group's members, summing to 1; a group of weight 0 counts all members alike."""
    member = torch.zeros(len(grouping.groups), len(weights), device=weights.device)
    for group, members in enumerate(grouping.groups):
        share = weights[list(members)].float()
        member[group, list(members)] = share / share.sum() if share.sum() > 0 else 1 / len(members)
    return member


def _num_tokens(pairs: RoutedPairs) -> Tensor:
    """[E] tokens that chose each expert."""
    return torch.tensor(pairs.starts, device=pairs.rows.device).diff().float()
