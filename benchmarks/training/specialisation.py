"""Have upcycled experts parted ways? If they are still copies, dimming is free and measuring it is worthless.

| figure                  | copies            | specialised      |
| ----------------------- | ----------------- | ---------------- |
| same-segment similarity | 1                 | well below       |
| dropping the routed experts costs | much    | much             |
| averaging a segment's copies costs | nothing | about as much as dropping them |
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.training.loop import held_out_loss
from benchmarks.training.moe_model import MoeLm
from engine.layers.linear import silu_and_mul


def measure(model: MoeLm, sequences: Tensor, batch: int) -> dict[str, Any]:
    """Losses in nats per token on held-out sequences [S, T], and mean cosines of expert outputs."""
    exact = held_out_loss(model, sequences, batch)
    same, other = output_similarity(model, sequences[:2])
    return {
        "held_out_loss": exact,
        "same_segment_similarity": same,
        "other_segment_similarity": other,
        "dropping_routed_costs": held_out_loss(_changed(model, _dropped), sequences, batch) - exact,
        "averaging_copies_costs": held_out_loss(_changed(model, _averaged), sequences, batch) - exact,
    }


@torch.no_grad()
def output_similarity(model: MoeLm, sequences: Tensor) -> tuple[float, float]:
    """Mean cosine of two experts' outputs on common inputs, over layers: copies of one segment, and all others."""
    device = next(model.parameters()).device
    num_segments = model.config.num_experts_per_token
    inputs: list[Tensor] = []
    hooks = [
        layer.moe_norm.register_forward_hook(lambda module, args, output: inputs.append(output.flatten(0, 1)[::4]))
        for layer in model.layers
    ]
    model.hidden(sequences.to(device))
    for hook in hooks:
        hook.remove()
    same, other = [], []
    segment = torch.arange(model.config.num_experts, device=device) % num_segments
    is_same = (segment[:, None] == segment[None, :]) & ~torch.eye(len(segment), dtype=torch.bool, device=device)
    for layer, x in zip(model.layers, inputs, strict=True):
        tables = zip(layer.moe.gate_up, layer.moe.down, strict=True)
        outputs = torch.stack([F.normalize(silu_and_mul(x @ g.t()) @ d.t(), dim=1) for g, d in tables])
        cosine = torch.einsum("asd,bsd->ab", outputs, outputs) / x.shape[0]
        same.append(cosine[is_same].mean())
        other.append(cosine[segment[:, None] != segment[None, :]].mean())
    return float(torch.stack(same).mean()), float(torch.stack(other).mean())


def _changed(model: MoeLm, change: Any) -> MoeLm:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for layer in changed.layers:
            change(layer.moe, model.config.num_experts_per_token)
    return changed


def _dropped(moe: Any, num_segments: int) -> None:
    moe.down.zero_()


def _averaged(moe: Any, num_segments: int) -> None:
    for table in (moe.gate_up, moe.down):
        by_copy = table.unflatten(0, (-1, num_segments))  # [copies, segments, ...]
        by_copy.copy_(by_copy.mean(dim=0, keepdim=True).expand_as(by_copy))
