"""Root-mean-square normalisation (Zhang and Sennrich 2019), computed in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class RmsNorm:
    """x / rms(x) * weight over the last dimension."""

    weight: Tensor  # [D]
    eps: float

    def __call__(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D]
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)

    def add(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:  # [T, D] each
        """x + delta, and its norm: the end of one residual block and the start of the next."""
        total = x + delta
        return total, self(total)


class HeadNorm:
    """RmsNorm of every query head and every key head, each kind with its own weight [head_dim] (Qwen3)."""

    def __init__(self, query_weight: Tensor, key_weight: Tensor, num_heads: int, num_kv_heads: int, eps: float) -> None:
        self.query_weight = query_weight
        self.key_weight = key_weight
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.eps = eps

    def __call__(self, qkv: Tensor) -> Tensor:
        """[T, (num_heads + 2 num_kv_heads) head_dim] with its queries and keys normalised; may overwrite ``qkv``."""
        heads = qkv.unflatten(-1, (-1, len(self.query_weight)))
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        q, k = RmsNorm(self.query_weight, self.eps)(q), RmsNorm(self.key_weight, self.eps)(k)
        return torch.cat((q, k, v), dim=1).flatten(1)
