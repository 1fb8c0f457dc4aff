"""The instant build: a united expert made of its members' best neurons, with a fitted down projection. No training.

Legend: G groups, F expert FFN width, D hidden size, P routed pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.moe.united import Grouping
from engine.unite.pairs import LayerTrace, RoutedPairs, expert_hidden
from engine.unite.united_layer import CHUNK_PAIRS, UnitedLayer

RIDGE = 1e-3  # share of the mean squared activation that is added to each
MAX_FIT_PAIRS = 32_768  # per group; more do not change a fit of F coefficients per output


@torch.no_grad()
def instant_build(trace: LayerTrace, pairs: RoutedPairs, grouping: Grouping) -> UnitedLayer:
    """Per group: the F member neurons of highest routed output energy, then ridge least squares for down_proj.

    The fit minimises the sum over routed pairs of w^2 |U(x) - E(x)|^2, as the distillation does.
    """
    size = trace.down.shape[2]
    gate_ups, downs = [], []
    for members in grouping.groups:
        gate_up = _best_neurons(trace, pairs.neuron_energy, members, size)
        gate_ups.append(gate_up)
        downs.append(_fit_down(gate_up, pairs, members))
    return UnitedLayer(grouping, torch.stack(gate_ups), torch.stack(downs).to(trace.down.dtype))


def _best_neurons(trace: LayerTrace, energy: Tensor, members: tuple[int, ...], size: int) -> Tensor:
    """gate_up [2F, D] of the F neurons of highest energy among all members' neurons."""
    best = energy[list(members)].flatten().topk(size).indices.sort().values
    expert = torch.tensor(members, device=best.device)[best // size]
    neuron = best % size
    return torch.cat((trace.gate_up[expert, neuron], trace.gate_up[expert, size + neuron]))


def _fit_down(gate_up: Tensor, pairs: RoutedPairs, members: tuple[int, ...]) -> Tensor:
    """down [D, F] in float32 by weighted ridge regression of the members' answers on the neurons' activations."""
    size, dim = gate_up.shape[0] // 2, pairs.targets.shape[1]
    device = gate_up.device
    gram = torch.zeros(size, size, device=device)
    cross = torch.zeros(size, dim, device=device)
    indices = pairs.of_experts(members)
    stride = max(1, -(-len(indices) // MAX_FIT_PAIRS))
    for chunk in indices[::stride].split(CHUNK_PAIRS):
        hidden = expert_hidden(gate_up, pairs.inputs[pairs.rows[chunk]]).float()
        weighted = hidden * pairs.loss_weights[chunk, None]
        gram += weighted.t() @ hidden
        cross += weighted.t() @ pairs.targets[chunk].float()
    scale = gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    gram = (gram / scale).double()
    gram.diagonal().add_(RIDGE)
    factor = torch.linalg.cholesky(gram)
    return torch.cholesky_solve((cross / scale).double(), factor).t().float().contiguous()
