"""How the controller describes itself to operators: plain dicts of numbers and words, nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

from controller.model_control import ModelControl, Policy
from controller.window import Replica


class StreamState(Protocol):
    sent_at_s: float
    num_refused: int


def describe_policy(policy: Policy) -> dict[str, Any]:
    return {"law": policy.law, "level": policy.level, "params": dict(policy.params)}


def describe_model(control: ModelControl, streams: Mapping[str, StreamState], now_s: float) -> dict[str, Any]:
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
        "num_windows": {str(verdict): count for verdict, count in control.window.num_windows.items()},
        "replicas": {
            replica_id: _describe_replica(control, replica, streams.get(replica_id), now_s)
            for replica_id, replica in control.window.replicas.items()
        },
    }


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
        "applied_epoch": last.applied_epoch if last else replica.hello.applied_epoch,
        "applied_version": last.applied_version if last else replica.hello.applied_version,
    }
