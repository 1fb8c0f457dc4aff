"""The law of BrownoutServe (arXiv 2507.17133), the baseline: multiplicative dimming, additive recovery, every 5 s.

The threshold p in (0, 1] is the share of the work that the original experts keep. Each phase has its own p, and its
step times stand for its promise: prefill steps against the TTFT objective, decode steps against the TPOT objective, so
a queue is invisible to this law. Constants are those of the authors' SLOAnalyzer (github.com/done-77/BrownoutMoE,
brownoutmoe/slo_analyzer.py). A level stands for a threshold: level = round((1 - p) * (num_levels - 1)).

| P90 of the phase's step times, at a check | p              | reason       |
|-------------------------------------------|----------------|--------------|
| above the SLO                             | 0.8 p          | slo_violated |
| in [0.8 SLO, SLO]                         | kept           | slo_met      |
| below 0.8 SLO                             | min(p + 0.1, 1)| headroom     |
| unknown (no step of the phase)            | kept           | no_data      |
| between two checks                        | kept           | as before    |

One departure: the authors read an empty window as P90 = 0 and recover; here no data holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from controller.laws.base import LawError
from controller.types import Decision, Observation, PhaseDecision, Reason, Slo

_LEAST_SHARE = 1e-3  # keeps p in (0, 1] after thousands of violated checks


@dataclass(frozen=True, slots=True)
class AimdParams:
    check_interval_s: float = 5.0  # SLOAnalyzer check_interval
    window_s: float = 2.0  # SLOAnalyzer max_search_seconds
    shrink_ratio: float = 0.8  # SLOAnalyzer shrink_ratio
    recover_step: float = 0.1  # SLOAnalyzer dynamic_*_threshold_adjustment
    warning_frac: float = 0.8  # SLOAnalyzer slo_warning_factor

    def __post_init__(self) -> None:
        for name in ("check_interval_s", "window_s", "recover_step"):
            if not getattr(self, name) > 0:
                raise LawError(f"{name} is {getattr(self, name)!r}; allowed: a positive number")
        for name in ("shrink_ratio", "warning_frac"):
            if not 0 < getattr(self, name) < 1:
                raise LawError(f"{name} is {getattr(self, name)!r}; allowed: in (0, 1)")


@dataclass(frozen=True, slots=True)
class AimdState:
    """Thresholds by phase; None: not known yet, taken from ``last`` at the first step."""

    p_prefill: float | None = None
    p_decode: float | None = None
    checked_at_s: float | None = None
    reason: Reason = Reason.STARTUP
    last: Decision | None = None


class AimdLaw:
    """floor = ceiling = the level that stands for the phase's threshold."""

    name = "aimd"

    def __init__(self, slo: Slo, params: AimdParams) -> None:
        self._slo = slo
        self._params = params
        self.window_s: float | None = params.window_s

    def initial(self, last: Decision | None = None) -> AimdState:
        return AimdState(last=last)

    def step(self, state: AimdState, observation: Observation, now_s: float) -> tuple[AimdState, Decision]:
        top = observation.num_levels - 1
        p_prefill = _share_of(state.last.prefill.floor if state.last else 0, top, state.p_prefill)
        p_decode = _share_of(state.last.decode.floor if state.last else 0, top, state.p_decode)
        state = replace(state, p_prefill=p_prefill, p_decode=p_decode)
        if state.checked_at_s is None or now_s - state.checked_at_s >= self._params.check_interval_s:
            p_prefill, why_prefill = self._check(p_prefill, observation.prefill.step_time_p90_s, self._slo.ttft_s)
            p_decode, why_decode = self._check(p_decode, observation.decode.step_time_p90_s, self._slo.tpot_s)
            reason = min((why_prefill, why_decode), key=_URGENCY.index)
            state = replace(state, p_prefill=p_prefill, p_decode=p_decode, checked_at_s=now_s, reason=reason)
        return state, Decision(
            prefill=_pinned(_level_of(p_prefill, top), self._slo.ttft_s),
            decode=_pinned(_level_of(p_decode, top), self._slo.tpot_s),
            law=self.name,
            reason=state.reason,
        )

    def _check(self, p: float, step_time_p90_s: float | None, slo_s: float) -> tuple[float, Reason]:
        if step_time_p90_s is None:
            return p, Reason.NO_DATA
        if step_time_p90_s > slo_s:
            return max(p * self._params.shrink_ratio, _LEAST_SHARE), Reason.SLO_VIOLATED
        if step_time_p90_s < self._params.warning_frac * slo_s:
            return min(p + self._params.recover_step, 1.0), Reason.HEADROOM
        return p, Reason.SLO_MET


_URGENCY = (Reason.SLO_VIOLATED, Reason.SLO_MET, Reason.HEADROOM, Reason.NO_DATA)


def _level_of(p: float, top: int) -> int:
    return math.floor((1 - p) * top + 0.5)


def _share_of(level: int, top: int, known: float | None) -> float:
    """``known``, else the threshold that ``level`` stands for."""
    if known is not None:
        return known
    return max(1 - min(level, top) / top, _LEAST_SHARE) if top > 0 else 1.0


def _pinned(level: int, budget_s: float) -> PhaseDecision:
    return PhaseDecision(floor=level, ceiling=level, budget_s=budget_s, margin=1.0)
