"""What may be done about a threatened promise, in the order of how fast and how reversible it is. Pure.

Rungs: dim (next step), switch models (a turn), queue by class and deadline, scale (a cold start), shed (last). The
arbiter compares the predicted TTFT of a request that would arrive now with the SLO, and engages rungs from the mildest
on until the prediction keeps the SLO; rungs that would not help are skipped.

| predicted TTFT                                                      | engaged up to     | reason              |
|---------------------------------------------------------------------|-------------------|---------------------|
| unknown                                                             | nothing           | no_data             |
| within the SLO at level 0                                           | nothing           | kept                |
| within it at some level of the ladder                               | dim               | dimming_carries     |
| within it once this model has the next turn                         | switch            | turn_carries        |
| within it for those that deadline order puts first                  | queue             | order_carries       |
| beyond it for all; replicas are starting or can be asked for        | scale             | capacity_comes      |
| ... but the wait would exceed ``patience_s``                        | shed              | patience_ends       |
| beyond it for all; no replica to come                               | shed              | at_capacity         |

Scale is also engaged whenever the planner wants more replicas, however calm it looks: dimming only bridges the wait.
Shed carries the share of arrivals to refuse, so that the rest waits no longer than the SLO allows, and the seconds
after which the queue will have drained, for Retry-After.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

MAX_SHED_FRAC = 0.95  # always let a few in: they are what shows that the overload is over


class Rung(StrEnum):
    DIM = "dim"
    SWITCH = "switch"
    QUEUE = "queue"
    SCALE = "scale"
    SHED = "shed"


class ArbiterReason(StrEnum):
    """Why the ladder of measures was climbed so far; a metric label."""

    NO_DATA = "no_data"
    KEPT = "kept"
    DIMMING_CARRIES = "dimming_carries"
    TURN_CARRIES = "turn_carries"
    ORDER_CARRIES = "order_carries"
    CAPACITY_COMES = "capacity_comes"
    PATIENCE_ENDS = "patience_ends"
    AT_CAPACITY = "at_capacity"


@dataclass(frozen=True, slots=True)
class ArbiterObservation:
    """Predicted TTFTs of a request that would arrive now; None: unknown, or that rung does not exist here."""

    ttft_slo_s: float
    ttft_level0_s: float | None  # nothing engaged
    ttft_dimmed_s: float | None = None  # at the highest level that is allowed
    ttft_switched_s: float | None = None  # dimmed, and this model's turn comes next
    ttft_first_s: float | None = None  # dimmed, for a request that deadline order puts first
    drain_s: float = 0.0  # until the present queue is empty, dimmed
    num_replicas: int = 1  # ready
    num_starting: int = 0
    num_desired: int = 1  # the planner's wish
    max_replicas: int = 1
    patience_s: float = float("inf")  # a client that must wait longer is better told at once


@dataclass(frozen=True, slots=True)
class ArbiterDecision:
    """The rungs engaged, mildest first."""

    rungs: tuple[Rung, ...]
    reason: ArbiterReason
    shed_frac: float = 0.0  # share of new arrivals to refuse
    retry_after_s: float = 0.0  # for those refused

    @property
    def highest(self) -> Rung | None:
        return self.rungs[-1] if self.rungs else None


def arbitrate(seen: ArbiterObservation) -> ArbiterDecision:
    """Engage as few rungs as keep the promise, or all that help."""
    if seen.ttft_level0_s is None:
        return ArbiterDecision(_with_scale((), seen), ArbiterReason.NO_DATA)
    best_s = seen.ttft_level0_s
    rungs: tuple[Rung, ...] = ()
    reason = ArbiterReason.KEPT
    for rung, predicted_s, why in (
        (Rung.DIM, seen.ttft_dimmed_s, ArbiterReason.DIMMING_CARRIES),
        (Rung.SWITCH, seen.ttft_switched_s, ArbiterReason.TURN_CARRIES),
        (Rung.QUEUE, seen.ttft_first_s, ArbiterReason.ORDER_CARRIES),
    ):
        if best_s <= seen.ttft_slo_s:
            return ArbiterDecision(_with_scale(rungs, seen), reason)
        if predicted_s is not None and predicted_s < best_s:
            best_s, rungs, reason = predicted_s, (*rungs, rung), why
    if best_s <= seen.ttft_slo_s:
        return ArbiterDecision(_with_scale(rungs, seen), reason)
    can_grow = seen.num_starting > 0 or seen.num_replicas < seen.max_replicas
    if can_grow and best_s <= seen.patience_s:
        return ArbiterDecision((*rungs, Rung.SCALE), ArbiterReason.CAPACITY_COMES)
    rungs = (*rungs, Rung.SCALE) if can_grow else rungs
    return ArbiterDecision(
        (*rungs, Rung.SHED),
        ArbiterReason.PATIENCE_ENDS if can_grow else ArbiterReason.AT_CAPACITY,
        shed_frac=min(1 - seen.ttft_slo_s / best_s, MAX_SHED_FRAC),
        retry_after_s=max(seen.drain_s, best_s - seen.ttft_slo_s),
    )


def _with_scale(rungs: tuple[Rung, ...], seen: ArbiterObservation) -> tuple[Rung, ...]:
    return (*rungs, Rung.SCALE) if seen.num_desired > seen.num_replicas + seen.num_starting else rungs
