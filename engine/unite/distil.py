"""Distillation of united experts on routed inputs: all groups of a layer at once, as batched matrix products.

Legend: G groups, B pairs per group and step, P routed pairs, D hidden size, F expert FFN width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.moe.united import Grouping
from engine.unite.pairs import LayerTrace, RoutedPairs, expert_hidden
from engine.unite.united_layer import UnitedLayer


@dataclass(frozen=True, slots=True)
class DistilOptions:
    """``learning_rate`` is a share of the weights' root mean square, so that one value fits every model's scale."""

    num_steps: int = 400
    num_tokens: int = 4096  # per step; each brings A routed pairs, shared out evenly over the groups
    learning_rate: float = 0.03
    warmup_frac: float = 0.05
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """Inputs and wanted outputs of one step, for every group."""

    inputs: Tensor  # [G, B, D]
    targets: Tensor  # [G, B, D]
    loss_weights: Tensor  # [G, B]


class RoutedSampler:
    """Draws pairs of each group uniformly; the loss weight of a pair is its router weight squared."""

    def __init__(self, pairs: RoutedPairs, grouping: Grouping, num_pairs: int, generator: torch.Generator) -> None:
        self._pairs, self._num_pairs, self._generator = pairs, num_pairs, generator
        per_group = [pairs.of_experts(members) for members in grouping.groups]
        device = pairs.rows.device
        # A group that no calibration token reached draws pairs of others, with no weight.
        self._reached = torch.tensor([len(g) > 0 for g in per_group], device=device)
        self._sizes = torch.tensor([max(len(g), 1) for g in per_group], device=device)
        self._starts = self._sizes.cumsum(0) - self._sizes
        self._pool = torch.cat([g if len(g) else pairs.rows.new_zeros(1) for g in per_group])

    def draw(self) -> Sample:
        shape = (len(self._sizes), self._num_pairs)
        uniform = torch.rand(shape, generator=self._generator, device=self._pool.device)
        offsets = (uniform * self._sizes[:, None]).long().clamp_max(self._sizes[:, None] - 1)
        chosen = self._pool[self._starts[:, None] + offsets]
        pairs = self._pairs
        weights = pairs.loss_weights[chosen] * self._reached[:, None]
        return Sample(pairs.inputs[pairs.rows[chosen]], pairs.targets[chosen], weights)


def distil(start: UnitedLayer, trace: LayerTrace, pairs: RoutedPairs, options: DistilOptions) -> UnitedLayer:
    """Train ``start`` to answer as its members do on the pairs that the router sends them.

    Loss: sum over routed pairs of w^2 |U(x) - E(x)|^2, each group on the scale of its own targets.
    """
    num_pairs = max(1, options.num_tokens * trace.ids.shape[1] // len(start.grouping.groups))
    generator = torch.Generator(pairs.rows.device).manual_seed(options.seed)
    sampler = RoutedSampler(pairs, start.grouping, num_pairs, generator)
    return train(start, sampler.draw, options)


def train(start: UnitedLayer, draw: Callable[[], Sample], options: DistilOptions) -> UnitedLayer:
    """AdamW with a short warm-up and a cosine to zero; float32 weights, bfloat16 products on a GPU."""
    gate_up, down = (nn.Parameter(table.detach().float().clone()) for table in (start.gate_up, start.down))
    on_gpu = gate_up.device.type == "cuda"
    groups = [
        {"params": [table], "lr": options.learning_rate * float(table.detach().square().mean().sqrt())}
        for table in (gate_up, down)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=on_gpu)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, options))
    scale: Tensor | None = None  # [G] energy of the first step's targets: Adam does not mind which constant it is
    for _ in range(options.num_steps):
        sample = draw()
        with torch.autocast(gate_up.device.type, torch.bfloat16, enabled=on_gpu):
            x = sample.inputs if on_gpu else sample.inputs.float()
            answers = expert_hidden(gate_up, x) @ down.mT
        targets = sample.targets.float()
        wrong = (sample.loss_weights * (answers.float() - targets).square().sum(dim=2)).mean(dim=1)
        if scale is None:
            scale = (sample.loss_weights * targets.square().sum(dim=2)).mean(dim=1)
            scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
        loss = (wrong / scale).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    dtype = start.gate_up.dtype
    return UnitedLayer(start.grouping, gate_up.detach().to(dtype), down.detach().to(dtype))


def _rate(step: int, options: DistilOptions) -> float:
    """Learning rate of a step, as a share of the highest."""
    warmup = max(1, int(options.warmup_frac * options.num_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, options.num_steps - warmup)))
