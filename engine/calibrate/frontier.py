"""Which settings deserve a place on the ladder: Pareto fronts, levels of equal loss, a knapsack over layers. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from engine.moe.ladder import Level

MIN_GAIN_FRAC = 0.01  # a setting that saves less of the step than this over a milder one is noise
MIN_LOSS = 0.001  # nats; differences below are beyond what calibration text of usual size resolves

Key = TypeVar("Key")


def pareto_front(levels: Sequence[Level]) -> tuple[Level, ...]:
    """The exact level and those measured ones that no other beats in both loss and step time, by ascending loss.

    Losses below zero are noise and count as zero.
    """
    front = [Level(loss=0.0, step_frac=1.0)]
    candidates = [level for level in levels if level.loss is not None and level.step_frac is not None]
    for level in sorted(candidates, key=lambda level: (max(level.loss or 0.0, 0.0), level.step_frac or 0.0)):
        if (level.step_frac or 0.0) <= (front[-1].step_frac or 0.0) - MIN_GAIN_FRAC:
            front.append(Level(level.setting, max(level.loss or 0.0, 0.0), level.step_frac))
    return tuple(front)


def align_levels(
    fronts: Mapping[Key, Sequence[Level]], num_levels: int, max_loss: float
) -> dict[Key, tuple[Level, ...]]:
    """``num_levels`` levels for every front, the exact one included: level i is the fastest setting within budget i.

    Budgets grow geometrically up to ``max_loss``, or to the largest loss there is. Budgets that change nothing in any
    front are left out, so there may be fewer levels.
    """
    losses = sorted({level.loss or 0.0 for front in fronts.values() for level in front if level.loss})
    within = [loss for loss in losses if loss <= max_loss]
    if not within:
        return {key: (front[0],) for key, front in fronts.items()}
    budgets = _spread(max(within[0], MIN_LOSS), within[-1], num_levels - 1)
    chosen: dict[Key, list[Level]] = {key: [front[0]] for key, front in fronts.items()}
    for budget in budgets:
        of_budget = {key: fastest(front, budget) for key, front in fronts.items()}
        if any(of_budget[key] != levels[-1] for key, levels in chosen.items()):
            for key, levels in chosen.items():
                levels.append(of_budget[key])
    return {key: tuple(levels) for key, levels in chosen.items()}


def allocate(losses: Sequence[Sequence[float]], total: int) -> tuple[int, ...]:
    """Experts per token for each layer: at most ``total`` over all layers, at least 1 in each, with the least loss.

    ``losses[layer][k - 1]``: what layer loses with its best k experts. Losses of layers are taken to add up, which
    underestimates them jointly; the result is to be measured. Raises ValueError if ``total`` is below 1 per layer.
    """
    if total < len(losses):
        raise ValueError(f"{total} experts cannot give each of {len(losses)} layers one")
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # experts spent |-> least loss, allocation
    for layer, by_k in enumerate(losses):
        left = len(losses) - layer - 1
        extended: dict[int, tuple[float, tuple[int, ...]]] = {}
        for spent, (loss, allocation) in best.items():
            for k, layer_loss in enumerate(by_k, start=1):
                if spent + k + left > total:
                    break
                option = (loss + layer_loss, (*allocation, k))
                if spent + k not in extended or option < extended[spent + k]:
                    extended[spent + k] = option
        best = extended
    return min(best.values())[1]


def fastest(front: Sequence[Level], budget: float) -> Level:
    """Of a Pareto front, the fastest level that loses no more than ``budget``."""
    return [level for level in front if (level.loss or 0.0) <= budget * (1 + 1e-9)][-1]


def _spread(low: float, high: float, count: int) -> list[float]:
    """``count`` budgets in geometric steps from ``low`` to ``high``."""
    if count == 1 or high <= low:
        return [high]
    return [low * (high / low) ** (index / (count - 1)) for index in range(count)]
