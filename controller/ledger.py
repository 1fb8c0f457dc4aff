"""The append-only record of decisions: who decided what, why, and on what evidence.

| kind     | by                              | what                                                            |
|----------|---------------------------------|-----------------------------------------------------------------|
| setting  | a law, or the guard over it     | a new setting for the replicas                                  |
| policy   | the operator                    | which law is in force                                           |
| plan     | the planner                     | how many replicas there should be                               |
| measures | the arbiter                     | which measures against a threatened SLO are engaged, or needed  |
| epoch    | the controller                  | a life of the controller began                                  |

Rows live in a ring in memory and, through settings.py, in a capped Redis stream; both forget the oldest first. Rows
that Redis has not got yet wait in the ring, so a Redis that is away costs nothing but the rows that fell out meanwhile.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from typing import Any

from controller.arbiter import ArbiterDecision
from controller.planner import FleetObservation, PlanDecision
from controller.types import Observation, Reason, Setting

CAPACITY = 4096
GUARD_REASONS = (Reason.UNMEASURED_LADDER, Reason.QUALITY_BUDGET, Reason.HOLD_ENDED)
ORDER_REASONS = (Reason.PINNED, Reason.BROWNOUT_OFF)
NOT_EVIDENCE = ("spent", "observed_s", "level_loss")  # of an Observation: kept elsewhere, or the same in every row


class DecisionLedger:
    """Newest decisions of all models, as JSON-able rows. Times are Unix times by the controller's clock."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self._rows: deque[dict[str, Any]] = deque(maxlen=capacity)
        self._num_unsaved = 0

    def append(self, setting: Setting, observation: Observation, time_s: float) -> dict[str, Any]:
        """Record ``setting``, taken on ``observation`` at Unix time ``time_s``."""
        decision = setting.decision
        return self._add(
            {
                "kind": "setting",
                "by": _author(decision.law, decision.reason),
                "time_s": round(time_s, 3),
                "model_id": setting.model_id,
                "epoch": setting.epoch,
                "version": setting.version,
                "law": decision.law,
                "reason": decision.reason,
                "inputs": _summary(observation),
                "decision": {"prefill": asdict(decision.prefill), "decode": asdict(decision.decode)},
            }
        )

    def append_policy(self, model_id: str, action: str, policy: dict[str, Any], time_s: float) -> dict[str, Any]:
        """Record what an operator did; ``model_id`` "*" means all models."""
        return self._add(
            {
                "kind": "policy",
                "by": "operator",
                "time_s": round(time_s, 3),
                "model_id": model_id,
                "reason": action,
                "decision": policy,
            }
        )

    def append_plan(self, model_id: str, plan: PlanDecision, fleet: FleetObservation, time_s: float) -> dict[str, Any]:
        """Record a new wish for replicas."""
        return self._add(
            {
                "kind": "plan",
                "by": "planner",
                "time_s": round(time_s, 3),
                "model_id": model_id,
                "reason": plan.reason,
                "inputs": _known(asdict(fleet)),
                "decision": _known(asdict(plan)),
            }
        )

    def append_measures(
        self, model_id: str, measures: ArbiterDecision, observation: Observation, time_s: float
    ) -> dict[str, Any]:
        """Record which rungs the arbiter climbed."""
        return self._add(
            {
                "kind": "measures",
                "by": "arbiter",
                "time_s": round(time_s, 3),
                "model_id": model_id,
                "reason": measures.reason,
                "inputs": _summary(observation),
                "decision": _known(asdict(measures)),
            }
        )

    def append_epoch(self, epoch: int, address: str, time_s: float) -> dict[str, Any]:
        """Record that a life of the controller began."""
        return self._add(
            {
                "kind": "epoch",
                "by": "controller",
                "time_s": round(time_s, 3),
                "model_id": "*",
                "epoch": epoch,
                "reason": "started",
                "decision": {"address": address},
            }
        )

    def recent(self, limit: int) -> list[dict[str, Any]]:
        """At most ``limit`` rows, newest first."""
        return list(islice(reversed(self._rows), max(limit, 0)))

    def between(self, since_s: float, until_s: float) -> list[dict[str, Any]]:
        """Rows of [since_s, until_s), Unix time, newest first."""
        return [row for row in reversed(self._rows) if since_s <= row["time_s"] < until_s]

    def of_versions(self, model_id: str, first: int, last: int) -> list[dict[str, Any]]:
        """The settings of a model with versions first to last, newest first."""
        rows = (row for row in reversed(self._rows) if row["kind"] == "setting" and row["model_id"] == model_id)
        return [row for row in rows if first <= row["version"] <= last]

    def unsaved(self) -> list[str]:
        """Rows that the stream has not got yet, oldest first, as JSON."""
        return [json.dumps(row) for row in list(self._rows)[len(self._rows) - self._num_unsaved :]]

    def mark_saved(self, num_rows: int) -> None:
        """The ``num_rows`` oldest unsaved rows are in the stream now."""
        self._num_unsaved = max(self._num_unsaved - num_rows, 0)

    def restore(self, saved: Iterable[str]) -> None:
        """Put what earlier lives saved, oldest first, before our own rows."""
        ours = list(self._rows)
        self._rows.clear()
        self._rows.extend(row for row in map(_parsed, saved) if row is not None)
        self._rows.extend(ours)

    def _add(self, row: dict[str, Any]) -> dict[str, Any]:
        self._rows.append(row)
        self._num_unsaved = min(self._num_unsaved + 1, self.capacity)
        return row


def _author(law: str, reason: Reason) -> str:
    if reason in GUARD_REASONS:
        return "guard"
    return "operator" if reason in ORDER_REASONS else f"law {law}"


def _summary(observation: Observation) -> dict[str, Any]:
    """What the law looked at, without what was unknown."""
    return _known({name: value for name, value in asdict(observation).items() if name not in NOT_EVIDENCE})


def _known(values: dict[str, Any]) -> dict[str, Any]:
    """JSON-able, without what is unknown or endless."""
    return {name: _rounded(value) for name, value in values.items() if value is not None and value != float("inf")}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return _known(value)
    return round(value, 6) if isinstance(value, float) else value


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        row = json.loads(text)
    except json.JSONDecodeError:
        return None
    return {"kind": "setting", **row} if isinstance(row, dict) and "model_id" in row else None
