"""The router of a MoE layer: which experts a token goes to, and with what weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """ids index the layer's packed expert table; an id equal to the table's length means "no expert"."""

    ids: Tensor  # [T, A] int64
    weights: Tensor  # [T, A]
    probs: Tensor | None = None  # [T, E] float32: what the gate thinks of every expert


@dataclass(slots=True)
class Gate:
    """Softmax over all E experts, then each row's best A with their probabilities as weights."""

    weight: Tensor  # [E, D]
    num_experts_per_token: int  # A
    norm_topk_prob: bool

    def __call__(self, x: Tensor) -> Routing:  # [T, D]
        probs = F.linear(x, self.weight).softmax(dim=-1, dtype=torch.float32)  # [T, E]
        weights, ids = probs.topk(self.num_experts_per_token, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return Routing(ids, weights.to(x.dtype), probs)
