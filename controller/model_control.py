"""The control of one model: observe, step the law, and number what changed. Pure: no clock, no network, no storage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from controller.arbiter import ArbiterDecision, ArbiterObservation, arbitrate
from controller.config import ControllerConfig
from controller.fleet import observe_fleet
from controller.guard import GuardState, guarded_step
from controller.laws.base import Law, create_law
from controller.planner import FleetObservation, PlanDecision, Planner
from controller.promise import observe_promise
from controller.quality import QualityAccount
from controller.reports import Hello
from controller.types import Decision, Observation, Setting
from controller.window import ModelWindow


@dataclass(frozen=True, slots=True)
class Policy:
    """Which law is in force, and its parameters. Law "static" at level 0 is "off"."""

    law: str
    params: Mapping[str, float] = field(default_factory=dict)

    @property
    def level(self) -> int | None:
        """The pinned level, None if the law moves it."""
        return int(self.params.get("level", 0)) if self.law == "static" else None


class ModelControl:
    """Turns reports about one model into settings. Versions only grow; an unchanged decision keeps its version."""

    def __init__(self, model_id: str, config: ControllerConfig, policy: Policy, epoch: int) -> None:
        self.model_id = model_id
        self.window = ModelWindow(config.window_s, config.stale_s)
        self.policy = policy
        self.observation = Observation()
        self.setting: Setting | None = None
        self.decision: Decision | None = None  # the latest; its reason may be newer than the setting's
        self.guard = GuardState()
        self.fleet: FleetObservation | None = None
        self.plan: PlanDecision | None = None
        self.promise: ArbiterObservation | None = None  # what a request that arrived now could expect
        self.measures: ArbiterDecision | None = None  # what the state of the promise calls for, mildest first
        self._config = config
        self._epoch = epoch
        self._version = 0
        self._law: Law[Any] = create_law(policy.law, config.slo_of(model_id), policy.params)
        self._state = self._law.initial()
        self._planner = Planner(config.slo_of(model_id), config.planner) if config.planner else None
        self._plan_state = self._planner.initial() if self._planner else None
        self._asked_at_s: float | None = None  # when the plan began to want more replicas than there are
        self._cold_start_s: float | None = None

    @property
    def place(self) -> tuple[int, int]:
        """(epoch, version) of the newest setting."""
        return self._epoch, self._version

    @property
    def to_save(self) -> Setting | None:
        """What a later life must continue: the decision in force, also while no replica has been sent it yet."""
        if self.decision is None:
            return None
        return self.setting or Setting(self.decision, self.model_id, *self.place, self._config.lease_s)

    def set_policy(self, policy: Policy) -> None:
        """Take the next decision by another law. LawError, and nothing changes, if it cannot be made."""
        law = create_law(policy.law, self._config.slo_of(self.model_id), policy.params)
        self.policy, self._law = policy, law
        self._state = law.initial(self.decision)

    def restore(self, setting: Setting, accounts: Mapping[str, QualityAccount] | None = None) -> None:
        """Continue a setting and the quality accounts that an earlier life of the controller left."""
        self._version = max(self._version, setting.version)
        if accounts:
            self.guard = replace(self.guard, accounts={**accounts, **self.guard.accounts})
        if self.decision is None:
            self.decision = setting.decision
            self.guard = replace(self.guard, last=setting.decision)
            self._state = self._law.initial(setting.decision)

    def begin_epoch(self, epoch: int) -> None:
        """Issue every later setting in ``epoch``; a no-op unless it is newer than ours."""
        if epoch > self._epoch:
            self._epoch = epoch
            self.setting = None  # the next tick numbers it anew

    def join(self, hello: Hello, now_s: float) -> None:
        """Connect a replica. A version that it got from another life of the controller is never issued again, and who
        knows of no decision goes on from the one that the replica follows."""
        self._version = max(self._version, hello.applied_version)
        if hello.applied is not None:
            self.restore(hello.applied)
        if self._asked_at_s is not None and hello.replica_id not in self.window.replicas and hello.applied is None:
            self._cold_start_s = now_s - self._asked_at_s
        self.window.join(hello, now_s)

    def tick(self, now_s: float) -> Setting | None:
        """The new setting if the decision changed, else None. Without replicas nothing is decided."""
        self.observation = self.window.observe(now_s, self._law.window_s)
        if self.observation.num_replicas == 0:
            return None
        self.guard, self._state, self.decision = guarded_step(
            self._config.guard, self.guard, self._law, self._state, self.observation, now_s
        )
        self.promise = self._observe_promise(self.decision, now_s)
        self.measures = arbitrate(self.promise)
        if self.setting is not None and _same_order(self.setting.decision, self.decision):
            return None
        self._version += 1
        self.setting = Setting(self.decision, self.model_id, self._epoch, self._version, self._config.lease_s)
        return self.setting

    def _observe_promise(self, decision: Decision, now_s: float) -> ArbiterObservation:
        planner = self._config.planner
        return observe_promise(
            {replica_id: replica.hello for replica_id, replica in self.window.replicas.items()},
            self.window.fresh(now_s),
            self.observation,
            decision,
            self._config.slo_of(self.model_id),
            self.plan.desired if self.plan else None,
            planner.max_replicas if planner else None,
        )

    def tick_plan(self, now_s: float) -> bool:
        """Plan the fleet; whether the plan changed. Nothing is planned without a planner or before a replica came."""
        hellos = [replica.hello for replica in self.window.replicas.values()]
        if self._planner is None or self._plan_state is None or not (hellos or self.plan):
            return False
        desired = self.plan.desired if self.plan else None
        self.fleet = observe_fleet(hellos, self.window.fresh(now_s), desired, self._cold_start_s)
        self._plan_state, plan = self._planner.step(self._plan_state, self.fleet, now_s)
        if plan.desired <= len(hellos):
            self._asked_at_s = None
        elif self._asked_at_s is None:
            self._asked_at_s = now_s
        changed = self.plan is None or self.plan.desired != plan.desired
        self.plan = plan
        return changed


def _same_order(one: Decision, other: Decision) -> bool:
    """Whether replicas would do the same under both; reasons may differ."""
    return (one.law, one.prefill, one.decode) == (other.law, other.prefill, other.decode)
