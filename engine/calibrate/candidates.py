"""Which settings are worth measuring, by phase and step size. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.calibrate.frontier import allocate
from engine.moe.settings import DimmerKind, DimSetting
from engine.types import Phase

SHARES = (0.3, 0.5, 0.7, 0.85, 1.0)
BUDGET_FRACS = (0.35, 0.5, 0.65)
CROWDED = 3.0  # pairs per expert from which re-picking has nothing left to save (notes: crossover at 1 to 2)


@dataclass(frozen=True, slots=True)
class StepSize:
    """A step to measure at. ``max_tokens``: the largest step that gets what is found here; None: any larger one."""

    phase: Phase
    num_tokens: int
    max_tokens: int | None = None

    @property
    def name(self) -> str:
        return f"{self.phase.name.lower()} {self.num_tokens}"


def step_sizes(decode: Sequence[int], prefill: Sequence[int]) -> tuple[StepSize, ...]:
    """Buckets that meet half-way, geometrically, between neighbouring sizes."""
    sizes = []
    for phase, counts in ((Phase.DECODE, sorted(set(decode))), (Phase.PREFILL, sorted(set(prefill)))):
        for count, following in zip(counts, [*counts[1:], None], strict=True):
            limit = None if following is None else round((count * following) ** 0.5)
            sizes.append(StepSize(phase, count, limit))
    return tuple(sizes)


def candidates(
    size: StepSize,
    ways: Sequence[int],
    num_experts: int,
    num_experts_per_token: int,
    allocations: Sequence[tuple[int, ...]],
    kinds: Sequence[DimmerKind],
) -> list[DimSetting]:
    """``allocations``: experts per token for each layer, as :func:`top_k_allocations` finds them."""
    found: list[DimSetting] = []
    for kind in (DimmerKind.UNITED, DimmerKind.PAPER):
        if kind in kinds:
            found += [DimSetting(kind, way=way, share=share) for way in ways for share in SHARES]
    fewer = range(num_experts_per_token - 1, 0, -1)
    crowded = size.num_tokens / num_experts > CROWDED
    if DimmerKind.PIGGYBACK in kinds and not crowded:
        found += [DimSetting(DimmerKind.PIGGYBACK, keep=keep) for keep in fewer]
        budgets = [round(frac * num_experts) for frac in BUDGET_FRACS]
        found += [DimSetting(DimmerKind.PIGGYBACK, keep=1, budget=budget) for budget in budgets if budget > 1]
    if DimmerKind.SIMILAR in kinds and not crowded:
        found += [
            DimSetting(DimmerKind.SIMILAR, keep=keep, min_similarity=rho) for keep in fewer for rho in (-1.0, 0.3)
        ]
    if DimmerKind.TOPK in kinds:
        found += [DimSetting(DimmerKind.TOPK, top_k=top_k) for top_k in allocations]
        whole = [DimSetting(DimmerKind.UNITED, way=way, share=1.0) for way in ways if DimmerKind.UNITED in kinds]
        found += [setting.with_top_k(top_k) for setting in whole for top_k in allocations[:2]]
    return found


def top_k_allocations(
    losses: Sequence[Sequence[float]], layers: Sequence[int], num_layers: int, num_experts_per_token: int
) -> list[tuple[int, ...]]:
    """Experts per token for every layer of the model, from mild to strong; layers not in ``layers`` keep all.

    ``losses[i][k - 1]``: loss of ``layers[i]`` alone with k experts.
    """
    found = []
    for tenths_left in range(9, 2, -1):
        total = max(len(layers), round(len(layers) * num_experts_per_token * tenths_left / 10))
        top_k = [num_experts_per_token] * num_layers
        for layer, k in zip(layers, allocate(losses, total), strict=True):
            top_k[layer] = k
        found.append(tuple(top_k))
    return list(dict.fromkeys(found))
