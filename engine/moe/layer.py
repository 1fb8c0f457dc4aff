"""A MoE layer: gate, dimmer, experts, and in some families a shared expert."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.batch import RowInfo
from engine.layers.linear import GatedMlp
from engine.moe.dimmer import Dimmer
from engine.moe.experts import PackedExperts
from engine.moe.gate import Gate
from engine.moe.load import ExpertCounter


@dataclass(slots=True)
class MoeLayer:
    """The plain path: gate, dimmer, grouped experts, shared expert. `engine.moe.fused` has its Triton twin."""

    index: int
    gate: Gate
    experts: PackedExperts
    shared_expert: GatedMlp | None
    shared_gate: Tensor | None  # [1, D], if there is a shared expert
    dimmer: Dimmer | None  # None: this layer is never dimmed
    counter: ExpertCounter | None = field(default=None, kw_only=True)

    def __call__(self, x: Tensor, rows: RowInfo, dimmed_pairs: Tensor) -> Tensor:
        """[T, D] -> [T, D]; adds the layer's dimmed pairs to ``dimmed_pairs`` [T]."""
        routing = self.gate(x)
        if self.dimmer is not None and rows.host_levels != (0, 0):
            dimmed = self.dimmer.rewrite(self.index, routing, rows)
            routing = dimmed.routing
            dimmed_pairs += dimmed.dimmed_pairs
        if self.counter is not None:
            self.counter.count_(self.index, routing.ids)
        routed = self.experts(x, routing)
        if self.shared_expert is None or self.shared_gate is None:
            return routed
        return routed + torch.sigmoid(F.linear(x, self.shared_gate)) * self.shared_expert(x)
