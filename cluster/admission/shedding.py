"""When a queue is too long to wait in: how fast it drains, and which share of arrivals to refuse. Pure.

The arbiter decides, with what the controller predicts of the engines and what this queue adds to it.

| the tenant's queue               | its drain rate | predicted TTFT, its wait included  | arrivals                  |
|----------------------------------|----------------|------------------------------------|---------------------------|
| empty                            | any            | any                                | admitted: they do no harm |
| held by its own `max_concurrent` | any            | any                                | admitted: they harm none  |
| not empty                        | unknown        | unknown                            | admitted                  |
| not empty                        | known          | within its target, or engines come | admitted                  |
| not empty                        | known          | beyond it, whatever milder is done | the arbiter's share shed  |
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from controller.arbiter import ArbiterDecision, ArbiterObservation, Rung, arbitrate

MEMORY_S = 5.0  # of the drain rate, in seconds with a queue
TRUSTED_S = 0.25  # with a queue; before, the rate is unknown


@dataclass(frozen=True, slots=True)
class Drain:
    """How fast a queue drains, over the time in which there was one: ``cost`` served in ``time_s``, both fading."""

    cost: float = 0.0
    time_s: float = 0.0
    noted_s: float | None = None  # None: there was no queue then

    def note(self, served: float, has_queue: bool, now_s: float) -> Drain:
        """``served`` was taken from the queue just now; ``has_queue``: whether some is left."""
        if self.noted_s is None:
            return replace(self, noted_s=now_s if has_queue else None)
        elapsed_s = max(0.0, now_s - self.noted_s)
        kept = math.exp(-elapsed_s / MEMORY_S)
        return Drain(kept * self.cost + served, kept * self.time_s + elapsed_s, now_s if has_queue else None)

    def wait_s(self, cost: float) -> float | None:
        """How long ``cost`` will take; None: unknown."""
        if self.time_s < TRUSTED_S or self.cost <= 0:
            return None
        return cost / self.cost * self.time_s


def judge(
    engines: ArbiterObservation | None, waiting_cost: float, drain: Drain, target_ttft_s: float, patience_s: float
) -> ArbiterDecision | None:
    """What to do about a tenant's arrivals, ``waiting_cost`` of which wait already; None: nothing.

    ``engines``: what the controller has observed of the model, None if it is silent.
    """
    wait_s = drain.wait_s(waiting_cost) if waiting_cost > 0 else None
    if wait_s is None:
        return None
    seen = engines or ArbiterObservation(ttft_slo_s=target_ttft_s, ttft_level0_s=0.0)
    decision = arbitrate(
        replace(
            seen,
            ttft_slo_s=target_ttft_s,
            ttft_level0_s=(seen.ttft_level0_s or 0.0) + wait_s,
            ttft_dimmed_s=_later(seen.ttft_dimmed_s, wait_s),
            ttft_switched_s=_later(seen.ttft_switched_s, wait_s),
            ttft_first_s=None,  # within one tenant's queue the order is by deadline already
            drain_s=seen.drain_s + wait_s,
            patience_s=min(seen.patience_s, patience_s),
        )
    )
    return decision if decision.highest is Rung.SHED else None


def _later(ttft_s: float | None, wait_s: float) -> float | None:
    return None if ttft_s is None else ttft_s + wait_s
