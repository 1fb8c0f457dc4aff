"""Rotary position embedding (Su et al. 2021), the half-split layout of Hugging Face checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor


class RotaryEmbedding:
    """cos and sin of every position, computed once."""

    def __init__(self, head_dim: int, max_position: int, theta: float, device: torch.device) -> None:
        inverse_frequency = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        angles = torch.outer(torch.arange(max_position, dtype=torch.float32), inverse_frequency)
        angles = torch.cat((angles, angles), dim=-1)  # [P, head_dim]
        self._cos = angles.cos().to(device)
        self._sin = angles.sin().to(device)

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, sin [T, 1, head_dim] of the step's positions [T]; gathered once for all layers."""
        return self._cos[positions].to(dtype).unsqueeze(1), self._sin[positions].to(dtype).unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads [T, H, head_dim] by cos, sin [T, 1, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
