"""Which settings are worth measuring, by phase and step size. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.calibrate.frontier import allocate, fastest, pareto_front
from engine.moe.ladder import Level
from engine.moe.settings import DimmerKind, DimSetting
from engine.types import Phase

SHARES = (0.3, 0.5, 0.7, 0.85, 1.0)
BUDGET_FRACS = (0.35, 0.5, 0.65)
CROWDED = 3.0  # pairs per expert from which re-picking has nothing left to save; it paid up to 1 or 2 where measured
MAX_COMBINED = 8  # a step size


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
    return found


def combinations(measured: Sequence[Level], max_loss: float) -> list[DimSetting]:
    """Dimmers over fewer experts per token that are worth measuring too, the most promising first.

    Those that would be faster than anything ``measured`` at one step size within the same loss, if losses added up and
    step times multiplied. Savings overlap, so that is a hope; at most MAX_COMBINED are to be tried.
    """
    cuts = [level for level in measured if level.setting.kind is DimmerKind.TOPK]
    others = [level for level in measured if not level.setting.top_k]
    hoped = [
        Level(
            other.setting.with_top_k(cut.setting.top_k),
            max(other.loss or 0.0, 0.0) + max(cut.loss or 0.0, 0.0),
            (other.step_frac or 1.0) * (cut.step_frac or 1.0),
        )
        for other in others
        for cut in cuts
    ]
    front = pareto_front(measured)
    gains = {
        level.setting: (fastest(front, level.loss or 0.0).step_frac or 1.0) - (level.step_frac or 1.0)
        for level in pareto_front([*measured, *hoped])
        if level not in front and (level.loss or 0.0) <= max_loss
    }
    return sorted(gains, key=lambda setting: -gains[setting])[:MAX_COMBINED]


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
