"""How the controller describes itself to operators: plain dicts of numbers and words, nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

from controller.config import ControllerConfig
from controller.model_control import ModelControl, Policy
from controller.quality import QualityAccount, allowed_loss_nats, left_frac
from controller.window import Replica


class StreamState(Protocol):
    sent_at_s: float
    num_refused: int


def describe_policy(policy: Policy) -> dict[str, Any]:
    return {"law": policy.law, "level": policy.level, "params": dict(policy.params)}


def describe_model(
    control: ModelControl, streams: Mapping[str, StreamState], config: ControllerConfig, now_s: float
) -> dict[str, Any]:
    """One model: its law, what is in force, what was last observed, and each replica."""
    epoch, version = control.place
    decision = control.decision
    return {
        "policy": describe_policy(control.policy),
        "law": control.policy.law,
        "reason": decision.reason if decision else None,
        "epoch": epoch,
        "version": version,
        "setting": asdict(control.setting) if control.setting else None,
        "observation": asdict(control.observation),
        "quality": _describe_quality(control, config, now_s),
        "plan": None if control.plan is None else _finite(asdict(control.plan)),
        "measures": None if control.measures is None else _finite(asdict(control.measures)),
        "step_time_s": _describe_shapes(control, now_s),
        "num_windows": {str(verdict): count for verdict, count in control.window.num_windows.items()},
        "replicas": {
            replica_id: _describe_replica(control, replica, streams.get(replica_id), now_s)
            for replica_id, replica in control.window.replicas.items()
        },
    }


def _describe_quality(control: ModelControl, config: ControllerConfig, now_s: float) -> dict[str, Any]:
    """Of each class with a budget: what it may still lose."""
    accounts = control.guard.accounts
    return {
        name: {
            "mean_loss_nats": budget.mean_loss_nats,
            "max_loss_nats": None if math.isinf(budget.max_loss_nats) else budget.max_loss_nats,
            "left_frac": left_frac(budget, accounts.get(name, QualityAccount()), now_s),
            "allowed_loss_nats": allowed_loss_nats(budget, accounts.get(name, QualityAccount()), now_s),
        }
        for name, budget in config.quality.items()
    }


def _describe_shapes(control: ModelControl, now_s: float) -> dict[str, dict[str, float]]:
    """phase |-> most tokens of the step |-> mean step time."""
    phases = control.window.samples(now_s).phases
    return {
        str(phase): {
            str(1 << log2_tokens): shape.step_time_s / shape.num_steps
            for log2_tokens, shape in sorted(part.shapes.items())
            if shape.num_steps
        }
        for phase, part in phases.items()
    }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {name: None if value == math.inf else value for name, value in values.items()}


def _describe_replica(
    control: ModelControl, replica: Replica, stream: StreamState | None, now_s: float
) -> dict[str, Any]:
    lease_s = control.setting.lease_s if control.setting else 0.0
    sent_at_s = stream.sent_at_s if stream else -math.inf
    last = replica.last
    return {
        "num_levels": replica.hello.num_levels,
        "ladder_measured": replica.hello.ladder_measured,
        "incarnation": replica.hello.incarnation,
        "stale": control.window.is_stale(replica, now_s),
        "quarantined": not replica.trust.is_trusted,
        "last_window_age_s": None if replica.last_at_s is None else now_s - replica.last_at_s,
        "lease_left_s": max(sent_at_s + lease_s - now_s, 0.0),
        "lease_expired": last.lease_expired if last else None,
        "num_refused": stream.num_refused if stream else 0,
        "level_prefill": last.level_prefill if last else None,
        "level_decode": last.level_decode if last else None,
        "num_running": last.num_running if last else None,
        "num_waiting": last.num_waiting if last else None,
        "kv_used_frac": last.kv_used_frac if last else None,
        "trim": last.trim if last else None,
        "start_s": replica.hello.start_s or None,
        "experts": asdict(last.experts) if last and last.experts else None,
        "applied_epoch": last.applied_epoch if last else replica.hello.applied_epoch,
        "applied_version": last.applied_version if last else replica.hello.applied_version,
    }
