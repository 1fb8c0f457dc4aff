"""The experts of a MoE layer as one packed table, and the plain torch computation over it.

Legend: T tokens, E original experts, U united experts, A experts per token, D hidden size, F expert FFN width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.layers.linear import silu_and_mul
from engine.moe.gate import Routing


@dataclass(slots=True)
class PackedExperts:
    """Originals first (ids 0..E-1), then the united experts of every loaded way (ids E..E+U-1)."""

    gate_up: Tensor  # [E+U, 2F, D]
    down: Tensor  # [E+U, D, F]
    num_originals: int  # E

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:
        """sum over a of weights[t, a] * expert[ids[t, a]](x[t]).  [T, D] -> [T, D]

        Rows are sorted by expert, so each active expert's weights are read once per step: the time of a small batch
        is proportional to the number of distinct experts, which is what dimming reduces.
        """
        num_experts, num_columns = self.gate_up.shape[0], routing.ids.shape[1]
        flat_ids = routing.ids.flatten()
        order = flat_ids.argsort(stable=True)
        counts = torch.bincount(flat_ids, minlength=num_experts + 1)[:num_experts].tolist()
        order = order[: sum(counts)]  # pairs without an expert sort last
        token_of = order // num_columns
        inputs = x[token_of]  # [P, D]
        gate_up = inputs.new_empty(len(order), self.gate_up.shape[1])
        for expert, start, end in _segments(counts):
            torch.mm(inputs[start:end], self.gate_up[expert].t(), out=gate_up[start:end])
        hidden = silu_and_mul(gate_up)  # [P, F]
        outputs = torch.empty_like(inputs)
        for expert, start, end in _segments(counts):
            torch.mm(hidden[start:end], self.down[expert].t(), out=outputs[start:end])
        outputs *= routing.weights.flatten()[order, None]
        return torch.zeros_like(x).index_add_(0, token_of, outputs)


def _segments(counts: list[int]) -> list[tuple[int, int, int]]:
    """(expert, start, end) of each active expert in the sorted pairs."""
    segments, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            segments.append((expert, start, start + count))
            start += count
    return segments
