"""The experts of a MoE layer as one packed table, and the plain torch computation over it.

Legend: T tokens, E original experts, U united experts, A experts per token, D hidden size, F expert FFN width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.layers.linear import silu_and_mul
from engine.moe.gate import Routing


@dataclass(slots=True)
class PackedExperts:
    """Originals first (ids 0..E-1), then the united experts of every loaded way (ids E..E+U-1).

    Weights are only ever replaced in place.
    """

    gate_up: Tensor  # [E+U, 2F, D]
    down: Tensor  # [E+U, D, F]
    num_originals: int  # E
    _gate_up_of: tuple[Tensor, ...] = field(init=False, repr=False)  # views [D, 2F], made once: a view takes as long as
    _down_of: tuple[Tensor, ...] = field(init=False, repr=False)  # [F, D]         a small product

    def __post_init__(self) -> None:
        self._gate_up_of = self.gate_up.mT.unbind()
        self._down_of = self.down.mT.unbind()

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
        if not len(order):
            return torch.zeros_like(x)
        token_of = order // num_columns
        active = [expert for expert, count in enumerate(counts) if count]
        sizes = [counts[expert] for expert in active]
        gate_up = _products(x.index_select(0, token_of), sizes, [self._gate_up_of[e] for e in active])  # [P, 2F]
        outputs = _products(silu_and_mul(gate_up), sizes, [self._down_of[e] for e in active])  # [P, D]
        outputs *= routing.weights.flatten()[order, None]
        return torch.zeros_like(x).index_add_(0, token_of, outputs)


def _products(rows: Tensor, sizes: list[int], matrices: list[Tensor]) -> Tensor:
    """Each segment of ``rows`` times its own matrix: [P, in] by [in, out] -> [P, out]"""
    return torch.cat(list(map(torch.mm, rows.split(sizes), matrices)))
