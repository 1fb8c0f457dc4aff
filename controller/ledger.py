"""The append-only record of decisions: what was decided, by which law, why, and on what evidence.

Rows live in a ring in memory and, through settings.py, in a capped Redis stream; both forget the oldest first. Rows
that Redis has not got yet wait in the ring, so a Redis that is away costs nothing but the rows that fell out meanwhile.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from controller.types import Observation, Setting

CAPACITY = 4096


class DecisionLedger:
    """Newest decisions of all models, as JSON-able rows."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self._rows: deque[dict[str, Any]] = deque(maxlen=capacity)
        self._num_unsaved = 0

    def append(self, setting: Setting, observation: Observation, time_s: float) -> dict[str, Any]:
        """Record ``setting``, taken on ``observation`` at Unix time ``time_s``."""
        decision = setting.decision
        row = {
            "time_s": round(time_s, 3),
            "model_id": setting.model_id,
            "epoch": setting.epoch,
            "version": setting.version,
            "law": decision.law,
            "reason": decision.reason,
            "inputs": _summary(observation),
            "decision": {"prefill": asdict(decision.prefill), "decode": asdict(decision.decode)},
        }
        self._rows.append(row)
        self._num_unsaved = min(self._num_unsaved + 1, self.capacity)
        return row

    def recent(self, limit: int, model_id: str | None = None) -> list[dict[str, Any]]:
        """At most ``limit`` rows, newest first."""
        rows = [row for row in reversed(self._rows) if model_id in (None, row["model_id"])]
        return rows[: max(limit, 0)]

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


def _summary(observation: Observation) -> dict[str, Any]:
    """What the law looked at, without what was unknown."""
    return {name: _rounded(value) for name, value in asdict(observation).items() if value is not None}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items() if inner is not None}
    return round(value, 6) if isinstance(value, float) else value


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        row = json.loads(text)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and "model_id" in row else None
