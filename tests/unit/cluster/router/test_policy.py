"""The truth table of cluster/router/policy.py, and what must hold for any loads."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.router.policy import ReplicaLoad, rank, score


def load(running: int = 0, waiting: int = 0, prefill: int = 0, kv: float = 0.0) -> ReplicaLoad:
    return ReplicaLoad(
        sequence=1,
        num_running=running,
        num_waiting=waiting,
        max_num_seqs=8,
        queued_prefill_tokens=prefill,
        max_num_batched_tokens=256,
        kv_used_frac=kv,
    )


TABLE = [
    ("none with a live load", {}, {}, None),
    ("one without a live load goes last", {"b": load(running=8)}, {}, ["b", "a"]),
    ("fewest held first", {"a": load(running=2), "b": load(running=1)}, {}, ["b", "a"]),
    ("waiting counts as held", {"a": load(waiting=2), "b": load(running=1)}, {}, ["b", "a"]),
    ("own picks count as held", {"a": load(running=1), "b": load(running=2)}, {"a": 2}, ["b", "a"]),
    ("fewest queued prefill tokens first", {"a": load(prefill=512), "b": load(prefill=16)}, {}, ["b", "a"]),
    ("most KV room first", {"a": load(kv=0.9), "b": load(kv=0.1)}, {}, ["b", "a"]),
]


@pytest.mark.parametrize(("loads", "picked", "expected"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_truth_table(loads: dict[str, ReplicaLoad], picked: dict[str, int], expected: list[str] | None) -> None:
    assert rank(["a", "b"], loads, picked, draw=lambda: 0.5) == expected


def test_equal_replicas_are_drawn_at_random() -> None:
    draw = random.Random(0).random
    firsts = {rank(["a", "b", "c"], dict.fromkeys("abc", load()), {}, draw)[0] for _ in range(50)}
    assert firsts == {"a", "b", "c"}


def test_simultaneous_requests_spread_evenly_over_stale_loads() -> None:
    picked = dict.fromkeys("abc", 0)
    for _ in range(30):
        first = rank(list("abc"), dict.fromkeys("abc", load(running=3)), picked, random.Random(0).random)[0]
        picked[first] += 1
    assert picked == {"a": 10, "b": 10, "c": 10}


loads_strategy = st.builds(
    load, st.integers(0, 1000), st.integers(0, 5000), st.integers(0, 10**6), st.floats(-0.5, 1.5)
)


@given(loads_strategy, st.integers(0, 1000))
def test_score_is_bounded_and_falls_with_every_pick(some: ReplicaLoad, num_picked: int) -> None:
    assert 0 <= score(some, num_picked + 1) < score(some, num_picked) <= 1


@given(st.dictionaries(st.sampled_from("abcd"), loads_strategy), st.integers(0, 2**32))
def test_every_candidate_is_ranked_once(loads: dict[str, ReplicaLoad], seed: int) -> None:
    order = rank(list("abcd"), loads, {}, random.Random(seed).random)
    assert order is None if not loads else sorted(order) == list("abcd")
