"""What one life of the controller knows: the models, the operator's policies, the ledger, its epoch. No I/O."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from controller.config import ControllerConfig
from controller.laws.base import LawError, create_law
from controller.ledger import DecisionLedger
from controller.model_control import ModelControl, Policy
from controller.settings import ALL_MODELS, Saved, ToSave

log = logging.getLogger(__name__)


class ControllerState:
    """Made empty; `restore` puts what earlier lives saved under what this one has learnt meanwhile."""

    def __init__(self, config: ControllerConfig) -> None:
        self.config = config
        self.ledger = DecisionLedger()
        self.policies: dict[str, Policy] = {}  # model_id or ALL_MODELS |-> what an operator set
        self.models: dict[str, ModelControl] = {}
        self.epoch = 0

    def control_of(self, model_id: str) -> ModelControl:
        """The model's control, begun if this is the first that is heard of it."""
        control = self.models.get(model_id)
        if control is None:
            policy = self.policy_of(model_id)
            control = self.models[model_id] = ModelControl(model_id, self.config, policy, self.epoch)
        return control

    def policy_of(self, model_id: str) -> Policy:
        configured = Policy(self.config.law, self.config.params)
        return self.policies.get(model_id) or self.policies.get(ALL_MODELS) or configured

    def set_policy(self, law: str, level: int | None, model_id: str | None) -> list[ModelControl]:
        """Take an operator's order; returns the models that it concerns. LawError if it cannot be followed.

        "off" pins level 0, "freeze" the level that the replicas have now, "auto" takes all orders back.
        """
        if model_id is not None and model_id not in self.models:
            raise LawError(f"model is {model_id!r}; allowed: {', '.join(sorted(self.models)) or 'none has reported'}")
        concerned = [control for control in self.models.values() if model_id in (None, control.model_id)]
        if law == "freeze":
            orders = {control: Policy("static", {"level": _level_now(control)}) for control in concerned}
            if not orders:
                raise LawError("brownout cannot be frozen before a replica has reported")
            for control, policy in orders.items():
                self.policies[control.model_id] = policy
        elif law == "auto":
            self.policies = {key: value for key, value in self.policies.items() if model_id not in (None, key)}
        elif model_id is None:
            self.policies = {ALL_MODELS: self._checked(law, level, concerned)}
        else:
            self.policies[model_id] = self._checked(law, level, concerned)
        for control in concerned:
            control.set_policy(self.policy_of(control.model_id))
        return concerned

    def begin_epoch(self, epoch: int) -> None:
        self.epoch = max(self.epoch, epoch)
        for control in self.models.values():
            control.begin_epoch(self.epoch)

    def restore(self, saved: Saved, epoch: int) -> None:
        for model_id, policy in saved.policies.items():
            try:
                create_law(policy.law, self.config.slo, policy.params)
            except LawError as error:
                log.warning("dropped the saved policy of %r: %s", model_id, error)
            else:
                self.policies.setdefault(model_id, policy)
        for model_id, setting in saved.settings.items():
            control = self.control_of(model_id)
            if control.policy != self.policy_of(model_id):
                control.set_policy(self.policy_of(model_id))
            control.restore(setting, saved.accounts.get(model_id))
        self.begin_epoch(epoch)

    def to_save(self, now_s: float) -> ToSave:
        controls = self.models.values()
        return ToSave(
            epoch=self.epoch,
            now_s=now_s,
            settings={c.model_id: saved for c in controls if (saved := c.to_save) is not None},
            policies=self.policies,
            accounts={c.model_id: c.guard.accounts for c in controls if c.guard.accounts},
            promises={c.model_id: json.dumps(_finite(asdict(c.promise))) for c in controls if c.promise is not None},
            plans={c.model_id: json.dumps(_finite(asdict(c.plan))) for c in controls if c.plan is not None},
        )

    def _checked(self, law: str, level: int | None, concerned: list[ModelControl]) -> Policy:
        if law == "off":
            law, level = "static", 0
        if level is not None and law != "static":
            raise LawError(f"level is {level!r} with law {law!r}; allowed: a level only with law 'static'")
        configured = self.config.law_params if law == self.config.law else {}
        params = {"level": level or 0} if law == "static" else configured
        create_law(law, self.config.slo, params)
        for control in concerned:
            _check_level(control, level or 0, self.config)
        return Policy(law, params)


def _check_level(control: ModelControl, level: int, config: ControllerConfig) -> None:
    """LawError if the model has no such level, or if its classes can never bear it."""
    seen = control.observation
    if level == 0 or not control.window.replicas:
        return
    if level >= seen.num_levels:
        raise LawError(f"level is {level}; allowed: 0 to {seen.num_levels - 1}, the ladder of {control.model_id!r}")
    if not seen.ladder_measured and not config.allow_unmeasured:
        raise LawError(
            f"level is {level}; allowed: 0, because the ladder of {control.model_id!r} has no measured losses "
            "(brownout.allow_unmeasured would dim it all the same)"
        )
    for service_class, budget in config.quality.items():
        if seen.level_loss and seen.level_loss[level] > budget.max_loss_nats:
            raise LawError(
                f"level is {level}, which loses {seen.level_loss[level]:g} nats; allowed: "
                f"at most {budget.max_loss_nats:g}, the limit of class {service_class!r}"
            )


def _level_now(control: ModelControl) -> int:
    seen = control.observation
    if seen.num_replicas == seen.num_stale:
        raise LawError(f"brownout of {control.model_id!r} cannot be frozen: no replica reports which level it has")
    return int(seen.level_now + 0.5)


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if value == float("inf") else value for name, value in values.items()}
