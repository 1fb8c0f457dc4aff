"""What no law may overrule: no quality curve, no dimming.

| ladder measured | allowed by name | what the law sees       | reason in force    |
|-----------------|-----------------|-------------------------|--------------------|
| yes             | any             | the observation         | the law's          |
| no              | yes             | the observation         | the law's          |
| no              | no              | a ladder of one level   | unmeasured_ladder  |
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from controller.laws.base import Law
from controller.types import Decision, Observation, Reason


def guarded_step(
    law: Law[Any], state: Any, observation: Observation, now_s: float, allow_unmeasured: bool
) -> tuple[Any, Decision]:
    """One step of ``law`` that never dims a ladder whose quality losses are unknown, unless that is allowed."""
    if observation.ladder_measured or allow_unmeasured or observation.num_levels == 1:
        return law.step(state, observation, now_s)
    state, decision = law.step(state, replace(observation, num_levels=1), now_s)
    if decision.reason is Reason.BROWNOUT_OFF:
        return state, decision
    return state, replace(decision, reason=Reason.UNMEASURED_LADDER)
