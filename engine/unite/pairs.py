"""The routed pairs of one layer: what each expert was given by the router, and what it made of it.

Legend: N calibration tokens, E experts, A experts per token, P routed pairs, D hidden size, F expert FFN width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.layers.linear import silu_and_mul


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """One MoE layer's experts and the calibration tokens that reached it."""

    gate_up: Tensor  # [E, 2F, D]
    down: Tensor  # [E, D, F]
    inputs: Tensor  # [N, D]
    ids: Tensor  # [N, A]
    weights: Tensor  # [N, A], router weights

    @property
    def num_experts(self) -> int:
        return self.gate_up.shape[0]

    def rows(self, start: int, end: int) -> LayerTrace:
        """The same layer with the tokens [start, end) only."""
        part = slice(start, end)
        return LayerTrace(self.gate_up, self.down, self.inputs[part], self.ids[part], self.weights[part])


@dataclass(frozen=True, slots=True)
class RoutedPairs:
    """Pairs sorted by expert: those of expert e are ``starts[e]`` to ``starts[e + 1]``."""

    inputs: Tensor  # [N, D], of the tokens
    rows: Tensor  # [P] token of each pair
    loss_weights: Tensor  # [P] float32, the router weight squared
    targets: Tensor  # [P, D] what the expert answered
    starts: tuple[int, ...]  # E + 1
    neuron_energy: Tensor  # [E, F] float32, sum over pairs of w^2 h^2 times the squared norm of the down column
    output_peak: tuple[float, ...]  # E, largest absolute output of each expert

    def of_experts(self, experts: tuple[int, ...]) -> Tensor:
        """Indices of the pairs of these experts, [P']."""
        device = self.rows.device
        return torch.cat([torch.arange(self.starts[e], self.starts[e + 1], device=device) for e in experts])


def expert_hidden(gate_up: Tensor, x: Tensor) -> Tensor:
    """SwiGLU activations. gate_up [2F, D] and x [P, D], or batched [G, 2F, D] and [G, P, D]; returns [.., P, F]."""
    return silu_and_mul(x @ gate_up.mT)


@torch.no_grad()
def routed_pairs(trace: LayerTrace) -> RoutedPairs:
    """Run every expert on the tokens that were routed to it."""
    num_experts, size = trace.num_experts, trace.down.shape[2]
    flat_ids = trace.ids.flatten()
    order = flat_ids.argsort(stable=True)
    counts = torch.bincount(flat_ids, minlength=num_experts).tolist()
    rows = order // trace.ids.shape[1]
    loss_weights = trace.weights.flatten()[order].float().square()
    targets = trace.inputs.new_empty(len(order), trace.inputs.shape[1])
    energy = torch.zeros(num_experts, size, device=rows.device)
    starts, peaks = [0], []
    for expert, count in enumerate(counts):
        start, end = starts[-1], starts[-1] + count
        starts.append(end)
        hidden = expert_hidden(trace.gate_up[expert], trace.inputs[rows[start:end]])
        targets[start:end] = hidden @ trace.down[expert].t()
        peaks.append(targets[start:end].abs().amax() if count else torch.zeros((), device=rows.device))
        column_energy = trace.down[expert].float().square().sum(dim=0)
        energy[expert] = (loss_weights[start:end, None] * hidden.float().square()).sum(dim=0) * column_energy
    return RoutedPairs(
        trace.inputs, rows, loss_weights, targets, tuple(starts), energy, tuple(torch.stack(peaks).float().tolist())
    )
