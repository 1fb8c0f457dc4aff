"""The truth table of cluster/router/policy.py, and what must hold for any loads."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.router.policy import Demand, Picked, Prediction, ReplicaLoad, predict, rank, score
from engine.step_time import StepTimeModel
from engine.types import PhaseSetting

# At level 0 a step takes 10 ms and 10 ms more per row, at level 1 half of that, at level 2 a quarter; full of prompt
# tokens it takes 200, 100 and 50 ms.
STEP_TIME = StepTimeModel((1, 9, 256), ((0.02, 0.10, 0.2), (0.01, 0.05, 0.1), (0.005, 0.025, 0.05)))
TPOT = PhaseSetting(0, 2, budget_s=0.06, margin=1.0)  # 5 rows at level 0, 11 at level 1
TTFT = PhaseSetting(0, 2, budget_s=1.0, margin=1.0)


def load(running: int = 0, waiting: int = 0, prefill: int = 0, kv: float = 0.0, level: int = 0) -> ReplicaLoad:
    return ReplicaLoad(
        sequence=1,
        num_running=running,
        num_waiting=waiting,
        max_num_seqs=8,
        queued_prefill_tokens=prefill,
        max_num_batched_tokens=256,
        kv_used_frac=kv,
        level=level,
        step_time=STEP_TIME,
        prefill=TTFT,
        decode=TPOT,
        mean_output_tokens=16,
    )


def slow(some: ReplicaLoad) -> ReplicaLoad:
    return replace(some, step_time=replace(STEP_TIME, trim=1 / 0.6))


def busy(some: ReplicaLoad) -> ReplicaLoad:
    """So many short requests that level 0 does not carry them, though few are here at a time."""
    return replace(some, arrivals_per_s=8.0)


PROMPT = Demand(num_prompt_tokens=128)
CACHED_ON_A = replace(PROMPT, cached_tokens={"a": 128})
AT_HOME_ON_A = replace(PROMPT, home="a")
EXACT = Demand(exact=True)
LONG_ON_A = {"a": Picked(1, prompt_tokens=2048), "b": Picked(1, prompt_tokens=16)}

TABLE = [
    ("none with a live load", {}, {}, PROMPT, None),
    ("one without a live load goes last", {"b": load(running=8, waiting=9)}, {}, PROMPT, ["b", "a"]),
    ("nearly out of KV blocks goes last", {"a": load(kv=0.97), "b": load(running=7)}, {}, PROMPT, ["b", "a"]),
    ("least level first, TPOT", {"a": load(running=5), "b": load(running=3, prefill=256)}, {}, PROMPT, ["b", "a"]),
    ("least level first, TTFT", {"a": load(1, prefill=20_000), "b": load(running=3)}, {}, PROMPT, ["b", "a"]),
    ("least level first, slower machine", {"a": slow(load(running=3)), "b": load(4)}, {}, PROMPT, ["b", "a"]),
    ("least level first, arrivals", {"a": busy(load(running=2)), "b": load(running=4)}, {}, PROMPT, ["b", "a"]),
    ("own picks count as held", {"a": load(running=2), "b": load(running=4)}, {"a": Picked(3)}, PROMPT, ["b", "a"]),
    ("level before affinity", {"a": load(running=5), "b": load(running=4)}, {}, CACHED_ON_A, ["b", "a"]),
    ("exact: undimmed first", {"a": load(level=1), "b": load(running=3)}, {}, EXACT, ["b", "a"]),
    ("not exact: the level now is no matter", {"a": load(level=1), "b": load(running=3)}, {}, PROMPT, ["a", "b"]),
    ("cached beginning", {"a": load(running=2), "b": load(running=1)}, {}, CACHED_ON_A, ["a", "b"]),
    ("the session's home", {"a": load(running=2), "b": load(running=1)}, {}, AT_HOME_ON_A, ["a", "b"]),
    ("no affinity far above the mean", {"a": load(running=4), "b": load()}, {"a": Picked(1)}, CACHED_ON_A, ["b", "a"]),
    ("least TTFT", {"a": load(2, prefill=2048), "b": load(2, prefill=16)}, {}, PROMPT, ["b", "a"]),
    ("picks' prompts count as queued", {"a": load(2), "b": load(2)}, LONG_ON_A, PROMPT, ["b", "a"]),
    ("waiting counts as held", {"a": load(waiting=2), "b": load(running=1)}, {}, PROMPT, ["b", "a"]),
    ("the same machine, faster", {"a": slow(load()), "b": load()}, {}, PROMPT, ["b", "a"]),
]


@pytest.mark.parametrize(
    ("loads", "picked", "demand", "expected"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_truth_table(
    loads: dict[str, ReplicaLoad], picked: dict[str, Picked], demand: Demand, expected: list[str] | None
) -> None:
    assert rank(["a", "b"], loads, picked, lambda: 0.5, demand) == expected


def test_the_prediction_is_the_governors() -> None:
    assert predict(load(running=4), 0) == Prediction(0, pytest.approx(0.06))
    assert predict(load(running=5), 0) == Prediction(1, pytest.approx(0.035))
    assert predict(load(running=4), 0, num_prompt_tokens=512) == Prediction(0, pytest.approx(2 * 0.2 + 0.06))
    # Five over the places: two steps each until one becomes free.
    assert predict(load(running=8, waiting=4), 0) == Prediction(1, pytest.approx(0.045 * 11))
    assert predict(replace(load(running=7), decode=replace(TPOT, floor=2), prefill=TTFT), 0).level == 2
    assert (
        predict(replace(load(running=99), decode=replace(TPOT, ceiling=0), prefill=replace(TTFT, ceiling=0)), 0).level
        == 0
    )


def test_without_a_profile_fewest_held_first() -> None:
    plain = {name: replace(load(running=n), step_time=None) for name, n in (("a", 3), ("b", 2))}
    assert rank(["a", "b"], plain, {}, lambda: 0.5) == ["b", "a"]
    assert rank(["a", "b"], plain, {"b": Picked(2)}, lambda: 0.5) == ["a", "b"]


def test_equal_replicas_are_drawn_at_random() -> None:
    draw = random.Random(0).random
    firsts = {rank(["a", "b", "c"], dict.fromkeys("abc", load()), {}, draw)[0] for _ in range(50)}
    assert firsts == {"a", "b", "c"}


def test_simultaneous_requests_spread_evenly_over_stale_loads() -> None:
    picked = dict.fromkeys("abc", Picked())
    for _ in range(30):
        first = rank(list("abc"), dict.fromkeys("abc", load(running=3)), picked, random.Random(0).random)[0]
        picked[first] = Picked(picked[first].num_requests + 1)
    assert picked == dict.fromkeys("abc", Picked(10))


loads_strategy = st.builds(
    load,
    st.integers(0, 1000),
    st.integers(0, 5000),
    st.integers(0, 10**6),
    st.floats(-0.5, 1.5),
    st.integers(0, 2),
)
demands = st.builds(Demand, num_prompt_tokens=st.integers(0, 10**5), exact=st.booleans())


@given(loads_strategy, st.integers(0, 1000), st.integers(0, 10**5), demands, st.floats(0, 1))
def test_score_is_bounded_and_falls_with_every_pick(
    some: ReplicaLoad, num_picked: int, prompt_tokens: int, demand: Demand, affinity: float
) -> None:
    more, fewer = (score(some, Picked(n, prompt_tokens), demand, affinity) for n in (num_picked + 1, num_picked))
    assert 0 <= more < fewer <= 1


@given(loads_strategy, loads_strategy, st.floats(0, 1), st.floats(0, 1))
def test_a_lower_level_always_scores_more(a: ReplicaLoad, b: ReplicaLoad, x: float, y: float) -> None:
    if predict(a, 0).level < predict(b, 0).level:
        assert score(a, Picked(), affinity=x) > score(b, Picked(), affinity=y)


@given(st.dictionaries(st.sampled_from("abcd"), loads_strategy), st.integers(0, 2**32))
def test_every_candidate_is_ranked_once(loads: dict[str, ReplicaLoad], seed: int) -> None:
    order = rank(list("abcd"), loads, {}, random.Random(seed).random)
    assert order is None if not loads else sorted(order) == list("abcd")
