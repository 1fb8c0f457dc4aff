"""Root-mean-square normalisation (Zhang and Sennrich 2019), computed in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class RmsNorm:
    weight: Tensor  # [D]
    eps: float

    def __call__(self, x: Tensor) -> Tensor:  # [T, D] -> [T, D]
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)

    def add(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:  # [T, D] each
        """x + delta, and its norm: the end of one residual block and the start of the next."""
        total = x + delta
        return total, self(total)
