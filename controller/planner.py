"""How many replicas a model needs, read from its load *as if undimmed*. Pure: no clock, no Ray.

Dimming hides the need for capacity: latencies are fine, so nothing seems to be missing. The planner therefore asks what
the same load would do at level 0. Tokens leave at num_running / step_s, whatever the level; a replica that gives out
its share r of them at level 0 holds N requests with

    N = r * t0(N) + waiting,    t0(N) = the line through (N now, level-0 step time now) and (full batch, its step time)

A fleet of R replicas *holds* the load if N <= target * max_num_seqs, t0(N) <= margin * TPOT, and its share of the
queued prompts is computed within margin * TTFT. The fleet grows to the least R that holds what is here, or what the
trend says will be here once a replica that starts now is up. It shrinks to the least R that would hold with
``down_slack`` to spare after consolidation at level 0, once that has been so for ``down_after_s``.

| fleet at level 0                                        | desired                    | reason      |
|---------------------------------------------------------|----------------------------|-------------|
| no replica reports                                      | as it is                   | no_data     |
| does not hold the load                                  | least that holds           | overload    |
| holds it, but not the trend over one cold start         | least that will hold       | cold_start  |
| a smaller one would hold; this one is dimmed now        | as it is                   | dimmed      |
| a smaller one would hold, not yet for ``down_after_s``  | as it is                   | settling    |
| a smaller one has held for ``down_after_s``             | least that holds with slack| consolidate |
| otherwise                                               | as it is                   | steady      |
| the limit cuts what it wants                            | the limit                  | at_max      |

"As it is" counts replicas that are starting: what was asked for is not asked for twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from controller.types import Slo


class PlanReason(StrEnum):
    """Why the fleet should have this size; a metric label."""

    NO_DATA = "no_data"
    OVERLOAD = "overload"
    COLD_START = "cold_start"
    DIMMED = "dimmed"
    SETTLING = "settling"
    CONSOLIDATE = "consolidate"
    STEADY = "steady"
    AT_MAX = "at_max"


@dataclass(frozen=True, slots=True)
class PlannerParams:
    """``target_frac`` of a batch is what may be planned; the rest takes the noise of arrivals."""

    min_replicas: int = 1
    max_replicas: int = 8
    target_frac: float = 0.85
    margin: float = 0.9  # of the SLO
    up_tau_s: float = 5.0  # smoothing of a rising load; a falling one is believed as slowly as down_after_s
    trend_tau_s: float = 20.0
    max_growth: float = 2.0  # the trend may at most double the load
    down_slack: float = 0.8  # a smaller fleet must hold the load in this share of its capacity
    down_after_s: float = 120.0
    cold_start_s: float = 60.0  # until one has been measured

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} and max_replicas {self.max_replicas} must satisfy 1 <= min <= max"
            )
        for name in ("target_frac", "margin", "down_slack"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: in (0, 1]")
        for name in ("up_tau_s", "trend_tau_s", "down_after_s", "cold_start_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: a positive number of seconds")
        if not self.max_growth >= 1:
            raise ValueError(f"max_growth is {self.max_growth!r}; allowed: 1 or more")


@dataclass(frozen=True, slots=True)
class FleetObservation:
    """One model's fleet. Times are means over the replicas that report; None: nobody ran a step."""

    num_ready: int  # replicas that report
    num_starting: int = 0  # asked for, not serving yet
    num_running: int = 0  # requests in batches, summed
    num_waiting: int = 0  # requests in queues, summed
    queued_prefill_tokens: int = 0  # summed
    level_mean: float = 0.0
    step_s: float | None = None  # predicted at the level in force, for the recent batch shape
    step_level0_s: float | None = None  # the same shape at level 0
    full_step_level0_s: float = 0.0  # of a full decode batch, from the profile
    max_num_seqs: int = 1  # of one replica
    max_num_batched_tokens: int = 1  # of one replica's step
    cold_start_s: float | None = None  # newest measured: from asking for a replica until it reported


@dataclass(frozen=True, slots=True)
class PlannerState:
    tokens_s: float | None = None  # smoothed output rate of the fleet
    trend_tokens_s2: float = 0.0
    cold_start_s: float | None = None
    smaller_since_s: float | None = None  # since when a smaller fleet would do
    stepped_at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PlanDecision:
    """``desired`` counts ready and starting replicas together."""

    desired: int
    reason: PlanReason
    needed_now: int  # the least fleet that holds the load at level 0
    needed_soon: int  # ... once a cold start has passed
    batch_level0: float  # requests that each replica would hold at level 0; inf: the load has no steady state there
    cold_start_s: float  # what the forecast looked ahead


class Planner:
    """``step(state, observation, now_s) -> (state, decision)``; ``now_s`` is any clock that does not go back."""

    def __init__(self, slo: Slo, params: PlannerParams) -> None:
        self._slo = slo
        self._params = params

    def initial(self) -> PlannerState:
        return PlannerState()

    def step(self, state: PlannerState, seen: FleetObservation, now_s: float) -> tuple[PlannerState, PlanDecision]:
        params = self._params
        size = seen.num_ready + seen.num_starting
        state = replace(state, cold_start_s=seen.cold_start_s or state.cold_start_s)
        cold_start_s = state.cold_start_s or params.cold_start_s
        if seen.num_ready == 0 or seen.step_s is None or seen.step_level0_s is None:
            state = replace(state, smaller_since_s=None, stepped_at_s=now_s)
            desired = min(max(size, params.min_replicas), params.max_replicas)
            return state, PlanDecision(desired, PlanReason.NO_DATA, desired, desired, 0.0, cold_start_s)
        state = self._smoothed(state, seen, now_s)
        rate = state.tokens_s or 0.0
        growth = max(0.0, state.trend_tokens_s2) * cold_start_s
        soon = min(rate + growth, params.max_growth * rate)
        now, later = self._least(seen, rate), self._least(seen, soon)
        smaller = self._least(seen, rate, params.down_slack)
        since_s = None
        if now > size:
            wanted, reason = now, PlanReason.OVERLOAD
        elif later > size:
            wanted, reason = later, PlanReason.COLD_START
        elif max(smaller, later, params.min_replicas) < size:
            since_s = now_s if state.smaller_since_s is None else state.smaller_since_s
            wanted, reason = size, PlanReason.SETTLING
            if seen.level_mean > 0:
                since_s, reason = None, PlanReason.DIMMED
            elif now_s - since_s >= params.down_after_s:
                wanted, reason = max(smaller, later), PlanReason.CONSOLIDATE
        else:
            wanted, reason = size, PlanReason.STEADY
        desired = min(max(wanted, params.min_replicas), params.max_replicas)
        if desired < wanted:
            reason = PlanReason.AT_MAX
        batch = self._batch(seen, rate, seen.num_ready)
        return replace(state, smaller_since_s=since_s), PlanDecision(desired, reason, now, later, batch, cold_start_s)

    def _smoothed(self, state: PlannerState, seen: FleetObservation, now_s: float) -> PlannerState:
        assert seen.step_s is not None
        rate = seen.num_running / seen.step_s if seen.step_s > 0 else 0.0
        if state.tokens_s is None:
            return replace(state, tokens_s=rate, stepped_at_s=now_s)
        elapsed_s = now_s - state.stepped_at_s
        if elapsed_s <= 0:
            return state
        params = self._params
        tau_s = params.up_tau_s if rate > state.tokens_s else params.down_after_s / 2
        smoothed = state.tokens_s + (1 - math.exp(-elapsed_s / tau_s)) * (rate - state.tokens_s)
        trend_gain = 1 - math.exp(-elapsed_s / params.trend_tau_s)
        trend = state.trend_tokens_s2
        trend += trend_gain * ((smoothed - state.tokens_s) / elapsed_s - trend)
        return replace(state, tokens_s=smoothed, trend_tokens_s2=trend, stepped_at_s=now_s)

    def _least(self, seen: FleetObservation, tokens_s: float, slack: float = 1.0) -> int:
        """The least number of replicas that holds the load, one more than allowed if none does."""
        limit = self._params.max_replicas
        return next((n for n in range(1, limit + 1) if self._holds(seen, tokens_s, n, slack)), limit + 1)

    def _holds(self, seen: FleetObservation, tokens_s: float, num_replicas: int, slack: float) -> bool:
        params = self._params
        batch = self._batch(seen, tokens_s, num_replicas)
        if batch > slack * params.target_frac * seen.max_num_seqs:
            return False
        step_s = _level0_step_s(seen, batch)
        prefill_steps = math.ceil(seen.queued_prefill_tokens / num_replicas / seen.max_num_batched_tokens)
        margin = slack * params.margin
        return step_s <= margin * self._slo.tpot_s and prefill_steps * step_s <= margin * self._slo.ttft_s

    def _batch(self, seen: FleetObservation, tokens_s: float, num_replicas: int) -> float:
        """Requests that each of ``num_replicas`` would hold at level 0: the fixed point of N = r * t0(N) + waiting."""
        rate = tokens_s / num_replicas
        slope, base_s = _level0_line(seen)
        if rate * slope >= 1:
            return math.inf
        return (rate * base_s + seen.num_waiting / num_replicas) / (1 - rate * slope)


def _level0_line(seen: FleetObservation) -> tuple[float, float]:
    """(seconds per request, seconds without requests) of a level-0 step; never falling, never negative."""
    assert seen.step_level0_s is not None
    batch = seen.num_running / seen.num_ready
    if batch >= seen.max_num_seqs or seen.full_step_level0_s <= seen.step_level0_s:
        return 0.0, seen.step_level0_s
    slope = (seen.full_step_level0_s - seen.step_level0_s) / (seen.max_num_seqs - batch)
    return slope, max(0.0, seen.step_level0_s - slope * batch)


def _level0_step_s(seen: FleetObservation, batch: float) -> float:
    slope, base_s = _level0_line(seen)
    return base_s + slope * batch
