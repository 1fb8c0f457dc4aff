"""United experts of one layer and one way, and the number that ranks builds: the held-out routed error.

Legend: G groups, P routed pairs, D hidden size, F expert FFN width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.moe.united import Grouping
from engine.unite.pairs import RoutedPairs, expert_hidden

CHUNK_PAIRS = 65_536  # bounds the activations held at once


@dataclass(frozen=True, slots=True)
class UnitedLayer:
    """G united experts of one layer, one for each group of ``grouping``."""

    grouping: Grouping
    gate_up: Tensor  # [G, 2F, D]
    down: Tensor  # [G, D, F]

    def to(self, dtype: torch.dtype) -> UnitedLayer:
        return UnitedLayer(self.grouping, self.gate_up.to(dtype), self.down.to(dtype))


@torch.no_grad()
def routed_errors(united: UnitedLayer, pairs: RoutedPairs) -> list[float]:
    """Of each group: sum of w^2 |U(x) - E(x)|^2 over its routed pairs, relative to the sum of w^2 |E(x)|^2.

    0: as good as the originals; 1: as bad as leaving them out. A group without pairs counts as 1.
    """
    errors = []
    for group, members in enumerate(united.grouping.groups):
        wrong = torch.zeros((), device=pairs.rows.device)
        whole = torch.zeros((), device=pairs.rows.device)
        for chunk in pairs.of_experts(members).split(CHUNK_PAIRS):
            x, targets = pairs.inputs[pairs.rows[chunk]], pairs.targets[chunk].float()
            answers = expert_hidden(united.gate_up[group].to(x.dtype), x) @ united.down[group].to(x.dtype).t()
            weights = pairs.loss_weights[chunk]
            wrong += weights @ (answers.float() - targets).square().sum(dim=1)
            whole += weights @ targets.square().sum(dim=1)
        errors.append(float(wrong / whole) if whole > 0 else 1.0)
    return errors


def mean_error(errors: list[float]) -> float:
    return sum(errors) / len(errors)
