"""What `explain` reads and says: ranges, and one request in plain words."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from cluster.explain import TimeRange, evidence, outcome, parse_range, request_sentences, summarise

NOW = datetime(2026, 11, 21, 12, 30, 0)
NOW_S = NOW.timestamp()


@pytest.mark.parametrize(
    ("text", "since_s", "until_s"),
    [
        ("10m", NOW_S - 600, NOW_S),
        ("1.5h", NOW_S - 5400, NOW_S),
        ("2h..1h", NOW_S - 7200, NOW_S - 3600),
        ("12:00..12:05", NOW_S - 1800, NOW_S - 1500),
        ("12:29:30..", NOW_S - 30, NOW_S),
        ("2026-11-21T12:00:00..30s", NOW_S - 1800, NOW_S - 30),
    ],
)
def test_ranges(text: str, since_s: float, until_s: float) -> None:
    assert parse_range(text, NOW) == TimeRange(since_s, until_s)


@pytest.mark.parametrize("text", ["4f1c0e", "10", "m", "12:00", "25:00..", "a..b", "..", "cmpl-10m"])
def test_anything_else_is_a_request_id(text: str) -> None:
    assert parse_range(text, NOW) is None


def request(**fields: Any) -> dict[str, Any]:
    return {
        "request_id": "a-1",
        "replica_id": "r1",
        "model_id": "model",
        "service_class": "standard",
        "finish_reason": "length",
        "ended_at_s": NOW_S,
        "duration_s": 1.5,
        "queue_wait_s": 0.25,
        "ttft_s": 0.5,
        "tpot_s": 0.2,
        "prompt_tokens": 9,
        "cached_tokens": 0,
        "completion_tokens": 6,
        "routed_pairs": 200,
        "dimmed_pairs": 50,
        "level_mean": 1.5,
        "level_peak": 2,
        "first_setting_version": 3,
        "last_setting_version": 4,
        **fields,
    }


def setting(version: int, floor: int, ceiling: int) -> dict[str, Any]:
    decode = {"floor": floor, "ceiling": ceiling, "budget_s": 0.1, "margin": 0.92}
    prefill = {**decode, "budget_s": 1.0, "margin": 0.8}
    inputs = {"ttft_p90_s": 1.2, "num_waiting": 7, "level_now": 1.0}
    decision = {"prefill": prefill, "decode": decode}
    return {"kind": "setting", "version": version, "decision": decision, "inputs": inputs}


def test_a_dimmed_request_in_plain_words() -> None:
    told = "\n".join(request_sentences(request(), [setting(3, 0, 4), setting(4, 0, 6)]))
    for words in (
        "class standard, model model, replica r1",
        "2026-11-21 12:30:00 by the replica's clock: length, after 1.50 s",
        "first token after 0.500 s (within the promised 1 s), 0.250 s of it in the queue",
        "then 0.2000 s per token (beyond the promised 0.1 s)",
        "25.0% of its expert pairs were dimmed, level 1.50 on average, 2 at most",
        "the replica's governor chose, step by step, within 0 to 6",
    ):
        assert words in told


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dimmed_pairs": 0, "level_peak": 0}, "its replica saw no need or no room"),
        ({"dimmed_pairs": 0, "level_peak": 0, "service_class": "full"}, "it is of class full"),
        ({"dimmed_pairs": 0, "level_peak": 2}, "nothing was cold enough"),
        ({"ttft_s": None, "tpot_s": None}, "it never got a token"),
    ],
)
def test_what_else_may_have_happened(fields: dict[str, Any], words: str) -> None:
    assert words in "\n".join(request_sentences(request(**fields), []))


def test_a_pinned_level_is_said_to_be_one() -> None:
    assert "pinned at 2" in "\n".join(request_sentences(request(), [setting(3, 2, 2)]))


def test_a_range_in_numbers() -> None:
    summary = summarise([request(), request(dimmed_pairs=0, ttft_s=0.1), request(ttft_s=None, finish_reason="abort")])
    assert (summary["num_requests"], summary["num_dimmed"], summary["dimmed_share"]) == (3, 2, 100 / 600)
    assert summary["by_reason"] == {"length": 2, "abort": 1}
    assert summarise([])["ttft_p90_s"] is None


def test_every_kind_of_decision_has_words() -> None:
    row = setting(3, 0, 4)
    assert outcome(row) == "prefill 0-4 x0.80, decode 0-4 x0.92"
    assert evidence(row) == "TTFT p90 1200 ms, 7 waiting, level 1.0"
    plan = {"kind": "plan", "decision": {"desired": 3}, "inputs": {"num_ready": 2, "num_waiting": 40}}
    assert (outcome(plan), evidence(plan)) == ("3 replicas", "2 ready, 0 starting, 0 running, 40 waiting")
    measures = {"kind": "measures", "decision": {"rungs": ["dim", "shed"]}, "inputs": {"oldest_wait_s": 2.5}}
    assert (outcome(measures), evidence(measures)) == ("dim + shed", "oldest wait 2500 ms, 0 waiting, level 0.0")
    policy = {"kind": "policy", "decision": {"law": "static", "level": 0}}
    assert (outcome(policy), evidence(policy)) == ("policy", "law static, level 0")
    epoch = {"kind": "epoch", "epoch": 4, "decision": {"address": "127.0.0.1:1"}}
    assert (outcome(epoch), evidence(epoch)) == ("epoch 4", "at 127.0.0.1:1")
