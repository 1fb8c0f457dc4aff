"""A proportional-integral law on measured latencies, at every tick (4 Hz), with anti-windup: the textbook baseline.

It has no model and no governor: each phase's level is pinned to round(kp * e + integral), e the relative error of the
phase's latency against ``target_frac`` of its SLO. TTFT (or the age of the oldest request that still waits, if that
is more) moves the prefill level, TPOT the decode level; a replica runs both phases in one step, so both are pinned to
the higher of the two.

| latency against its target          | level                                        | reason       |
|-------------------------------------|----------------------------------------------|--------------|
| above the SLO                       | rises                                        | slo_violated |
| above the target, within the SLO    | rises slowly                                 | slo_met      |
| below the target                    | falls, never below 0                         | headroom     |
| unknown, or all telemetry overdue   | kept                                         | no_data, stale_data |

The integral stays within [0, top] by back-calculation: what saturation cuts off is fed back, so it never winds up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from controller.laws.base import LawError
from controller.types import Decision, Observation, PhaseDecision, Reason, Slo


@dataclass(frozen=True, slots=True)
class PiParams:
    """Gains are shares of the ladder at a relative error of 1."""

    kp: float = 0.3
    ki_per_s: float = 0.2
    target_frac: float = 0.9  # of the SLO
    max_error: float = 1.0
    window_s: float = 2.0

    def __post_init__(self) -> None:
        for name in ("kp", "ki_per_s", "target_frac", "max_error", "window_s"):
            if not getattr(self, name) > 0:
                raise LawError(f"{name} is {getattr(self, name)!r}; allowed: a positive number")


@dataclass(frozen=True, slots=True)
class PiState:
    """Shares of the ladder, in [0, 1]; ``last`` is in force until the first evidence."""

    ttft_integral: float = 0.0
    tpot_integral: float = 0.0
    ttft_share: float = 0.0  # what each controller asks for
    tpot_share: float = 0.0
    stepped_at_s: float | None = None
    last: Decision | None = None


class PiLaw:
    """floor = ceiling = the level that the greater of two PI controllers asks for."""

    name = "pi"

    def __init__(self, slo: Slo, params: PiParams) -> None:
        self._slo = slo
        self._params = params
        self.window_s: float | None = params.window_s

    def initial(self, last: Decision | None = None) -> PiState:
        return PiState(last=last)

    def step(self, state: PiState, observation: Observation, now_s: float) -> tuple[PiState, Decision]:
        top = observation.num_levels - 1
        if state.last is not None and top > 0:
            share = min(state.last.decode.floor / top, 1.0)
            state = PiState(share, share, share, share)
        elapsed_s = 0.0 if state.stepped_at_s is None else min(now_s - state.stepped_at_s, self._params.window_s)
        state = replace(state, stepped_at_s=now_s)
        if observation.num_replicas > 0 and observation.num_stale == observation.num_replicas:
            return state, self._pinned(state, top, Reason.STALE_DATA)
        known_s = [s for s in (observation.ttft_p90_s, observation.oldest_wait_s or None) if s is not None]
        errors: list[float] = []
        if known_s:
            error = self._error(max(known_s), self._slo.ttft_s)
            integral, share = self._control(state.ttft_integral, error, elapsed_s)
            state = replace(state, ttft_integral=integral, ttft_share=share)
            errors.append(error)
        if observation.tpot_p90_s is not None:
            error = self._error(observation.tpot_p90_s, self._slo.tpot_s)
            integral, share = self._control(state.tpot_integral, error, elapsed_s)
            state = replace(state, tpot_integral=integral, tpot_share=share)
            errors.append(error)
        return state, self._pinned(state, top, self._reason(errors))

    def _error(self, latency_s: float, slo_s: float) -> float:
        error = latency_s / slo_s - self._params.target_frac
        return min(max(error, -self._params.max_error), self._params.max_error)

    def _control(self, integral: float, error: float, elapsed_s: float) -> tuple[float, float]:
        """The integral after ``elapsed_s``, and the share of the ladder to dim."""
        integral = min(max(integral + self._params.ki_per_s * error * elapsed_s, 0.0), 1.0)
        return integral, min(max(self._params.kp * error + integral, 0.0), 1.0)

    def _reason(self, errors: list[float]) -> Reason:
        if not errors:
            return Reason.NO_DATA
        if max(errors) > 1 - self._params.target_frac:
            return Reason.SLO_VIOLATED
        return Reason.SLO_MET if max(errors) > 0 else Reason.HEADROOM

    def _pinned(self, state: PiState, top: int, reason: Reason) -> Decision:
        level = min(math.floor(max(state.ttft_share, state.tpot_share) * top + 0.5), top)
        return Decision(
            prefill=PhaseDecision(level, level, self._slo.ttft_s, 1.0),
            decode=PhaseDecision(level, level, self._slo.tpot_s, 1.0),
            law=self.name,
            reason=reason,
        )
