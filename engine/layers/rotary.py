"""Rotary position embedding (Su et al. 2021), the half-split layout of Hugging Face checkpoints."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.kv_cache.storage import KvStorage
from engine.models.spec import RopeScaling


class RotaryEmbedding:
    """cos and sin of every position, computed once."""

    def __init__(
        self,
        head_dim: int,
        max_position: int,
        theta: float,
        device: torch.device,
        scaling: RopeScaling | None = None,
    ) -> None:
        inverse_frequency = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        if scaling is not None:
            inverse_frequency = _scale(inverse_frequency, scaling)
        angles = torch.outer(torch.arange(max_position, dtype=torch.float32), inverse_frequency)
        angles = torch.cat((angles, angles), dim=-1)  # [P, head_dim]
        self.cos = angles.cos().to(device)  # [P, head_dim] float32
        self.sin = angles.sin().to(device)

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin [T, head_dim] float32 of the step's positions [T]; gathered once for all layers."""
        return self.cos[positions], self.sin[positions]


def _scale(inverse_frequency: Tensor, scaling: RopeScaling) -> Tensor:  # [head_dim / 2] -> [head_dim / 2]
    stretched = inverse_frequency / scaling.factor
    if scaling.kind == "linear":
        return stretched
    # llama3: turns within the original context; few turns are stretched, many are kept, between them a ramp.
    turns = scaling.original_max_position * inverse_frequency / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(stretched, inverse_frequency, kept.clamp(0, 1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads [T, H, head_dim] by cos, sin [T, head_dim]."""
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rotate_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, slots: Tensor, kv: KvStorage, layer: int
) -> Tensor:
    """Rotated queries [T, num_heads, head_dim]; rotated keys and plain values go to ``slots`` [T] of one layer's KV.

    ``qkv`` [T, (num_heads + 2 num_kv_heads) head_dim] may be overwritten.
    """
    num_kv_heads, head_dim = kv.keys.shape[-2:]
    turned, v = qkv.unflatten(-1, (-1, head_dim)).split((num_heads + num_kv_heads, num_kv_heads), dim=1)
    turned = rotate(turned, cos, sin)
    kv.write(layer, slots, turned[:, num_heads:], v)
    return turned[:, :num_heads]
