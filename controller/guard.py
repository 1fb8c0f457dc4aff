"""What no law may overrule: the last hand on every decision. Pure.

In this order; the reason is the last rule's that changed something:

| situation                                                | floor and ceiling                     | reason            |
|----------------------------------------------------------|---------------------------------------|-------------------|
| the ladder's losses are not known, nor allowed by name   | both 0                                | unmeasured_ladder |
| ... allowed by name, but some class has a quality budget | both 0                                | unmeasured_ladder |
| no step was reported for ``hold_s``, a law decides       | floor 0; ceiling kept                 | hold_ended        |
| a class may lose less than a level costs                 | at most the deepest it can afford     | quality_budget    |
| a law forces levels to move by more than slew_levels     | slew_levels closer, one step a tick   | the law's         |
| an operator's order (law static), brownout off included  | at once, within the rules above       | the law's         |

A floor that rises, a ceiling that falls and a pinned level that moves force levels to move; a range that widens does
not. Floor 0 and an untouched ceiling leave it to each replica's own governor, which sees its load in any case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from controller.laws.base import Law
from controller.quality import QualityAccount, QualityBudget, allowed_loss_nats
from controller.types import Decision, Observation, PhaseDecision, QualitySpent, Reason

ORDERS = "static"  # the law by which an operator pins a level


@dataclass(frozen=True, slots=True)
class GuardParams:
    """Sizing: ``hold_s`` bridges a gap in the telemetry, not a night without traffic. ``slew_levels`` per tick at 4 Hz
    cross a ladder of eight levels within a second."""

    allow_unmeasured: bool = False
    budgets: Mapping[str, QualityBudget] = field(default_factory=dict)  # by service class; others have no limit
    hold_s: float = 10.0
    slew_levels: int = 2
    tick_s: float = 0.25


@dataclass(frozen=True, slots=True)
class GuardState:
    """``last`` is the decision in force; ``accounts`` outlive the controller."""

    last: Decision | None = None
    moved_at_s: float = float("-inf")
    accounts: Mapping[str, QualityAccount] = field(default_factory=dict)
    spent: Mapping[str, QualitySpent] = field(default_factory=dict)  # as of the last step
    observed_s: float = 0.0


def guarded_step(
    params: GuardParams, guard: GuardState, law: Law[Any], state: Any, observation: Observation, now_s: float
) -> tuple[GuardState, Any, Decision]:
    """One step of ``law`` within the guard's rules."""
    guard = charge(params, guard, observation, now_s)
    may_dim = may_dim_at_all(params, observation)
    state, decision = law.step(state, observation if may_dim else replace(observation, num_levels=1), now_s)
    is_order = decision.law == ORDERS
    if not may_dim and decision.reason is not Reason.BROWNOUT_OFF:
        decision = replace(decision, reason=Reason.UNMEASURED_LADDER)
    if not is_order and _is_in_the_dark(params, observation):
        released = replace(decision, prefill=_below(decision.prefill, 0), decode=_below(decision.decode, 0))
        decision = _changed(decision, released, Reason.HOLD_ENDED)
    deepest = deepest_level(params, guard, observation, now_s)
    capped = replace(decision, prefill=_capped(decision.prefill, deepest), decode=_capped(decision.decode, deepest))
    decision = _changed(decision, capped, Reason.QUALITY_BUDGET)
    if not is_order and guard.last is not None:
        reach = params.slew_levels if now_s - guard.moved_at_s >= params.tick_s / 2 else 0
        decision = _slewed(guard.last, decision, reach)
        top = observation.num_levels - 1 if may_dim else 0  # which holds whatever was in force
        decision = replace(decision, prefill=_capped(decision.prefill, top), decode=_capped(decision.decode, top))
    moved = guard.last is None or _levels(guard.last) != _levels(decision)
    return replace(guard, last=decision, moved_at_s=now_s if moved else guard.moved_at_s), state, decision


def may_dim_at_all(params: GuardParams, observation: Observation) -> bool:
    """Whether the ladder may be climbed: its losses are known, or nobody is promised anything about them."""
    return observation.ladder_measured or (params.allow_unmeasured and not params.budgets)


def charge(params: GuardParams, guard: GuardState, observation: Observation, now_s: float) -> GuardState:
    """Book what each class lost since the last step.

    A class's loss is the mean over its tokens, and it lasted for the mean time that the replicas' new reports cover:
    reports that come late, after a partition or a restart of the controller, are charged when they come.
    """
    covered_s = (observation.observed_s - guard.observed_s) / max(observation.num_replicas, 1)
    accounts = dict(guard.accounts)
    for service_class in params.budgets:
        before = guard.spent.get(service_class, QualitySpent())
        after = observation.spent.get(service_class, QualitySpent())
        num_tokens = after.num_tokens - before.num_tokens
        lost = (after.loss_nats - before.loss_nats) / num_tokens * covered_s if num_tokens > 0 else 0.0
        accounts[service_class] = accounts.get(service_class, QualityAccount()).spend(lost, now_s)
    return replace(guard, accounts=accounts, spent=observation.spent, observed_s=observation.observed_s)


def deepest_level(params: GuardParams, guard: GuardState, observation: Observation, now_s: float) -> int:
    """The deepest level that every class with a budget can afford now."""
    top = observation.num_levels - 1
    if not observation.level_loss:
        return top  # then no class has a budget, or nothing is dimmed anyway
    for service_class, budget in params.budgets.items():
        allowed = allowed_loss_nats(budget, guard.accounts.get(service_class, QualityAccount()), now_s)
        while top > 0 and observation.level_loss[top] > allowed:
            top -= 1
    return top


def _is_in_the_dark(params: GuardParams, observation: Observation) -> bool:
    return observation.evidence_age_s is None or observation.evidence_age_s > params.hold_s


def _below(phase: PhaseDecision, floor: int) -> PhaseDecision:
    return replace(phase, floor=min(phase.floor, floor))


def _capped(phase: PhaseDecision, deepest: int) -> PhaseDecision:
    return replace(phase, floor=min(phase.floor, deepest), ceiling=min(phase.ceiling, deepest))


def _changed(before: Decision, after: Decision, reason: Reason) -> Decision:
    return before if _levels(before) == _levels(after) else replace(after, reason=reason)


def _slewed(last: Decision, wanted: Decision, reach: int) -> Decision:
    prefill, decode = _near(last.prefill, wanted.prefill, reach), _near(last.decode, wanted.decode, reach)
    return replace(wanted, prefill=prefill, decode=decode)


def _near(last: PhaseDecision, wanted: PhaseDecision, reach: int) -> PhaseDecision:
    floor = min(wanted.floor, last.floor + reach)
    ceiling = max(wanted.ceiling, last.ceiling - reach)
    if wanted.floor == wanted.ceiling:
        floor, ceiling = max(floor, last.floor - reach), min(ceiling, last.ceiling + reach)
    return replace(wanted, floor=floor, ceiling=ceiling)


def _levels(decision: Decision) -> tuple[int, int, int, int]:
    prefill, decode = decision.prefill, decision.decode
    return prefill.floor, prefill.ceiling, decode.floor, decode.ceiling
