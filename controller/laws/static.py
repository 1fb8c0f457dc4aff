"""A fixed level, whatever is observed: for operators, for baselines, and for switching dimming off.

| level asked for | ladder's top | level in both phases | reason       |
|-----------------|--------------|----------------------|--------------|
| 0               | any          | 0                    | brownout_off |
| n > 0           | >= n         | n                    | pinned       |
| n > 0           | t < n        | t                    | pinned       |
"""

from __future__ import annotations

from dataclasses import dataclass

from controller.laws.base import LawError
from controller.types import Decision, Observation, PhaseDecision, Reason, Slo


@dataclass(frozen=True, slots=True)
class StaticParams:
    level: float = 0  # a whole number; JSON does not keep them apart

    def __post_init__(self) -> None:
        if not (self.level >= 0 and float(self.level).is_integer()):
            raise LawError(f"level is {self.level!r}; allowed: a whole number, 0 or more")


class StaticLaw:
    """floor = ceiling = the level asked for, or the ladder's top if it is shorter. It has no state."""

    name = "static"
    window_s: float | None = None

    def __init__(self, slo: Slo, params: StaticParams) -> None:
        self._slo = slo
        self._level = int(params.level)

    def initial(self, last: Decision | None = None) -> None:
        return None

    def step(self, state: None, observation: Observation, now_s: float) -> tuple[None, Decision]:
        level = min(self._level, observation.num_levels - 1)
        return None, Decision(
            prefill=PhaseDecision(floor=level, ceiling=level, budget_s=self._slo.ttft_s, margin=1.0),
            decode=PhaseDecision(floor=level, ceiling=level, budget_s=self._slo.tpot_s, margin=1.0),
            law=self.name,
            reason=Reason.PINNED if self._level > 0 else Reason.BROWNOUT_OFF,
        )
