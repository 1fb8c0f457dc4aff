"""The default law: give the governor the whole ladder, and correct its bias by integral action on measured latencies.

The governor of each replica predicts step times and picks a level before every step; that is the fast loop. Its model
may be wrong in ways that it cannot see (a shape it was not profiled for, time lost outside the engine). This slow loop
looks once a second at what clients saw and shifts the margin, the share of the SLO that the governor may plan for:

| evidence, for one phase                                | shift of its margin                        | reason       |
|--------------------------------------------------------|--------------------------------------------|--------------|
| no sample                                              | kept                                       | no_data      |
| every replica's telemetry is overdue                   | kept                                       | stale_data   |
| P90 above the SLO, levels below the ladder's top       | falls (dim earlier), tighten gain          | slo_violated |
| P90 above the SLO, already at the top                  | kept: saturated, no integration            | slo_violated |
| P90 in (target, SLO], levels below the ladder's top    | falls                                      | slo_met      |
| P90 at or below the target, something is dimmed        | rises (dim later), relax gain              | headroom     |
| P90 at or below the target, nothing is dimmed          | decays to zero: nothing left to correct    | headroom     |

TTFT evidence is the greater of the measured P90 and the age of the oldest request that still waits, which is known
before any first token is. The shift stays within +-max_shift by back-calculation: what the limit cuts off is fed back
to the integrator, which therefore never winds up. "At the top" is a mean level in the top half step of the ladder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from controller.laws.base import LawError
from controller.types import Decision, Observation, PhaseDecision, Reason, Slo


@dataclass(frozen=True, slots=True)
class PredictiveParams:
    """Gains are margin per second at a relative error of 1."""

    ttft_margin: float = 0.27  # most of the promise is kept for what arrives after the prediction
    tpot_margin: float = 0.92
    max_shift: float = 0.1
    target_frac: float = 0.95  # of the SLO: where P90 should settle
    tighten_gain: float = 0.1  # full shift within 2 s at an error of one half
    relax_gain: float = 0.02  # five times slower, so that recovery does not oscillate
    max_error: float = 0.5
    decay_s: float = 10.0  # time constant of an idle shift's way back to zero
    interval_s: float = 1.0

    def __post_init__(self) -> None:
        for name in ("tighten_gain", "relax_gain", "max_error", "decay_s", "interval_s", "target_frac"):
            if not getattr(self, name) > 0:
                raise LawError(f"{name} is {getattr(self, name)!r}; allowed: a positive number")
        for name in ("ttft_margin", "tpot_margin"):
            if not self.max_shift < getattr(self, name) <= 1:
                raise LawError(f"{name} is {getattr(self, name)!r}; allowed: above max_shift and at most 1")
        if not 0 <= self.max_shift < 1:
            raise LawError(f"max_shift is {self.max_shift!r}; allowed: in [0, 1)")


@dataclass(frozen=True, slots=True)
class PredictiveState:
    prefill_shift: float = 0.0
    decode_shift: float = 0.0
    stepped_at_s: float | None = None
    reason: Reason = Reason.STARTUP


class PredictiveLaw:
    """floor 0, ceiling at the ladder's top, budgets equal to the SLO, margins corrected slowly."""

    name = "predictive"
    window_s: float | None = None

    def __init__(self, slo: Slo, params: PredictiveParams) -> None:
        self._slo = slo
        self._params = params

    def initial(self, last: Decision | None = None) -> PredictiveState:
        if last is None or last.law != self.name:
            return PredictiveState()
        return PredictiveState(
            prefill_shift=self._limited(last.prefill.margin - self._params.ttft_margin),
            decode_shift=self._limited(last.decode.margin - self._params.tpot_margin),
            reason=Reason.RESTORED,
        )

    def step(self, state: PredictiveState, observation: Observation, now_s: float) -> tuple[PredictiveState, Decision]:
        if state.stepped_at_s is None:
            state = replace(state, stepped_at_s=now_s)
        elapsed_s = now_s - (state.stepped_at_s or 0.0)
        if elapsed_s >= self._params.interval_s:
            state = self._corrected(state, observation, now_s, min(elapsed_s, 2 * self._params.interval_s))
        return state, Decision(
            prefill=self._room(observation, self._slo.ttft_s, self._params.ttft_margin + state.prefill_shift),
            decode=self._room(observation, self._slo.tpot_s, self._params.tpot_margin + state.decode_shift),
            law=self.name,
            reason=state.reason,
        )

    def _corrected(
        self, state: PredictiveState, observation: Observation, now_s: float, elapsed_s: float
    ) -> PredictiveState:
        if observation.num_replicas > 0 and observation.num_stale == observation.num_replicas:
            return replace(state, stepped_at_s=now_s, reason=Reason.STALE_DATA)
        top = observation.num_levels - 1
        ttft_s = _greater(observation.ttft_p90_s, observation.oldest_wait_s or None)
        prefill_level = observation.prefill.level_mean if observation.prefill.num_tokens else observation.level_now
        decode_level = observation.decode.level_mean if observation.decode.num_tokens else observation.level_now
        prefill_shift, why_prefill = self._shifted(
            state.prefill_shift, ttft_s, self._slo.ttft_s, prefill_level, top, elapsed_s
        )
        decode_shift, why_decode = self._shifted(
            state.decode_shift, observation.tpot_p90_s, self._slo.tpot_s, decode_level, top, elapsed_s
        )
        reason = min((why_prefill, why_decode), key=_URGENCY.index)
        return PredictiveState(prefill_shift, decode_shift, now_s, reason)

    def _shifted(
        self, shift: float, p90_s: float | None, slo_s: float, level: float, top: int, elapsed_s: float
    ) -> tuple[float, Reason]:
        params = self._params
        if p90_s is None:
            return shift, Reason.NO_DATA
        error = max(-params.max_error, min(params.max_error, params.target_frac - p90_s / slo_s))
        if error < 0:
            reason = Reason.SLO_VIOLATED if p90_s > slo_s else Reason.SLO_MET
            if level >= top - 0.5:
                return shift, reason
            return self._limited(shift + params.tighten_gain * error * elapsed_s), reason
        if level <= 0:
            return shift * math.exp(-elapsed_s / params.decay_s), Reason.HEADROOM
        return self._limited(shift + params.relax_gain * error * elapsed_s), Reason.HEADROOM

    def _limited(self, raw_shift: float) -> float:
        """Back-calculation with a tracking gain of 1: the integrator is left exactly where the limit cut it."""
        return max(-self._params.max_shift, min(self._params.max_shift, raw_shift))

    def _room(self, observation: Observation, budget_s: float, margin: float) -> PhaseDecision:
        # Hundredths, because each new value is a new setting version for every replica.
        return PhaseDecision(floor=0, ceiling=observation.num_levels - 1, budget_s=budget_s, margin=round(margin, 2))


_URGENCY = (Reason.SLO_VIOLATED, Reason.SLO_MET, Reason.HEADROOM, Reason.NO_DATA)


def _greater(one: float | None, other: float | None) -> float | None:
    known = [value for value in (one, other) if value is not None]
    return max(known, default=None)
