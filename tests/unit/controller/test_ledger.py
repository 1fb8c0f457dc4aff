"""The ledger: newest first, bounded, and nothing is saved twice or forgotten before it is saved."""

from __future__ import annotations

import json

from controller.ledger import DecisionLedger
from controller.types import Decision, Observation, PhaseDecision, PhaseObservation, Reason, Setting


def setting(version: int) -> Setting:
    phase = PhaseDecision(0, 3, 0.1, 0.92)
    return Setting(Decision(phase, phase, "predictive", Reason.HEADROOM), "model", 1, version, 2.0)


def test_newest_first() -> None:
    ledger = DecisionLedger()
    for version in range(1, 6):
        ledger.append(setting(version), Observation(), float(version))
    assert [row["version"] for row in ledger.recent(3)] == [5, 4, 3]
    assert ledger.recent(0) == []


def test_a_row_is_json_and_leaves_out_what_is_unknown() -> None:
    ledger = DecisionLedger()
    seen = Observation(ttft_p90_s=0.1234567, decode=PhaseObservation(num_steps=3))
    row = json.loads(json.dumps(ledger.append(setting(1), seen, 12.3456)))
    assert row["time_s"] == 12.346
    assert row["inputs"]["ttft_p90_s"] == 0.123457
    assert "tpot_p90_s" not in row["inputs"] and "step_time_p90_s" not in row["inputs"]["decode"]
    assert row["decision"]["decode"] == {"floor": 0, "ceiling": 3, "budget_s": 0.1, "margin": 0.92}


def test_rows_that_arrive_while_others_are_saved_stay_unsaved() -> None:
    ledger = DecisionLedger()
    ledger.append(setting(1), Observation(), 0.0)
    ledger.append(setting(2), Observation(), 0.0)
    in_flight = ledger.unsaved()
    ledger.append(setting(3), Observation(), 0.0)
    ledger.mark_saved(len(in_flight))
    assert [json.loads(row)["version"] for row in ledger.unsaved()] == [3]


def test_capacity_forgets_the_oldest() -> None:
    ledger = DecisionLedger(capacity=3)
    for version in range(1, 6):
        ledger.append(setting(version), Observation(), 0.0)
    assert [json.loads(row)["version"] for row in ledger.unsaved()] == [3, 4, 5]


def test_restored_rows_come_before_our_own() -> None:
    ledger = DecisionLedger()
    ledger.append(setting(9), Observation(), 0.0)
    ledger.restore(['{"model_id": "model", "version": 7}', "garbage", '{"model_id": "model", "version": 8}'])
    assert [row["version"] for row in ledger.recent(10)] == [9, 8, 7]
    assert [json.loads(row)["version"] for row in ledger.unsaved()] == [9]
