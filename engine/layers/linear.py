"""Dense projections."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(slots=True)
class Linear:
    """y = x W^T + b."""

    weight: Tensor  # [out, in]
    bias: Tensor | None = None  # [out]

    def __call__(self, x: Tensor) -> Tensor:  # [T, in] -> [T, out]
        return F.linear(x, self.weight, self.bias)


def silu_and_mul(gate_up: Tensor) -> Tensor:  # [T, 2F] -> [T, F]
    """silu(gate) * up, where the first half of the columns is the gate."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@dataclass(slots=True)
class GatedMlp:
    """down(silu(gate(x)) * up(x)), gate and up packed into one projection."""

    gate_up: Tensor  # [2F, D]
    down: Tensor  # [D, F]

    def __call__(self, x: Tensor) -> Tensor:  # [T, D] -> [T, D]
        return F.linear(silu_and_mul(F.linear(x, self.gate_up)), self.down)
