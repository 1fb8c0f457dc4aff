"""The governor's truth table row by row, then what must hold for every load."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.governor import (
    DOWN_S,
    MAX_QUEUE_SAMPLES,
    SMOOTHING_S,
    GovernorState,
    StepObservation,
    Waiting,
    choose_levels,
    observe_arrival,
    observe_finish,
    sample_positions,
)
from engine.step_time import StepTimeModel
from engine.types import BrownoutSetting, Levels, PhaseSetting

# A step of 32 tokens takes 100, 80, 60, 40, 20 ms at levels 0 to 4.
MODEL = StepTimeModel((1, 32), tuple((0.01, full_s) for full_s in (0.1, 0.08, 0.06, 0.04, 0.02)))
TOP = MODEL.num_levels - 1
ANY_S = math.inf


def setting(floor: int = 0, ceiling: int = TOP, ttft_s: float = ANY_S, tpot_s: float = ANY_S) -> BrownoutSetting:
    return BrownoutSetting(
        prefill=PhaseSetting(floor, ceiling, ttft_s, margin=1.0),
        decode=PhaseSetting(floor, ceiling, tpot_s, margin=1.0),
    )


def full_step(*waiting: Waiting, **overrides: float) -> StepObservation:
    observation = StepObservation(
        num_tokens=32, waiting=waiting, max_num_seqs=32, prefill_tokens_per_step=96, max_num_batched_tokens=128
    )
    return replace(observation, **overrides)


def at_level(level: int) -> GovernorState:
    return replace(GovernorState.initial(MODEL), level=level)


def run_for(
    duration_s: float, state: GovernorState, order: BrownoutSetting, observation: StepObservation, start_s: float = 0.0
) -> tuple[GovernorState, list[int]]:
    """A step every 50 ms; returns the levels chosen."""
    levels = []
    for step in range(round(duration_s / 0.05)):
        state, chosen = choose_levels(state, order, observation, start_s + step * 0.05)
        levels.append(chosen.decode)
    return state, levels


@pytest.mark.parametrize(
    ("level_before", "order", "observation", "expected"),
    [
        pytest.param(0, setting(3, 3), full_step(), 3, id="pinned-up-at-once"),
        pytest.param(4, setting(1, 1), full_step(Waiting(9, 99.0, 900)), 1, id="pinned-down-at-once-whatever-the-load"),
        pytest.param(0, setting(tpot_s=0.1), full_step(), 0, id="level-0-keeps-the-budget"),
        pytest.param(0, setting(tpot_s=0.099), full_step(), 1, id="least-level-that-keeps-tpot"),
        pytest.param(0, setting(tpot_s=0.045), full_step(), 3, id="several-levels-up-at-once"),
        pytest.param(0, setting(tpot_s=0.001), full_step(), TOP, id="no-level-keeps-tpot"),
        pytest.param(0, setting(ceiling=2, tpot_s=0.001), full_step(), 2, id="ceiling-holds"),
        pytest.param(0, setting(floor=2), full_step(), 2, id="floor-holds"),
        pytest.param(0, setting(floor=9, ceiling=9), full_step(), TOP, id="ladder-shorter-than-the-setting"),
        pytest.param(0, setting(ttft_s=1.0), full_step(Waiting(1, 0.0, 96)), 0, id="short-queue-needs-nothing"),
        # One place frees up every 2 steps (64 tokens, 32 places): the 10th of the queue starts after 20 steps, and its
        # first token takes one more. 1.3 s / 21 steps = 62 ms: level 2.
        pytest.param(0, setting(ttft_s=1.3), full_step(Waiting(10, 0.0, 96)), 2, id="queue-for-a-place"),
        pytest.param(0, setting(ttft_s=1.3), full_step(Waiting(10, 0.4, 96)), 3, id="waited-time-counts"),
        pytest.param(0, setting(ttft_s=1.3), full_step(Waiting(10, 0.0, 96), num_free_slots=5), 0, id="free-places"),
        # 2000 prompt tokens in chunks of 96 beside 32 decoding rows: 20.8 steps of 128 tokens. A step of 128 tokens
        # takes 379, 297, 215, 133 and 51 ms, so 3 s leave 144 ms for each: level 3.
        pytest.param(0, setting(ttft_s=3.0), full_step(Waiting(0, 0.0, 2000)), 3, id="long-prompt-in-the-batch"),
        pytest.param(0, setting(ttft_s=1.3), full_step(Waiting(0, 2.0, 24)), TOP, id="already-late"),
        pytest.param(
            0, setting(ttft_s=1.3, tpot_s=0.045), full_step(Waiting(10, 0.0, 96)), 3, id="the-stricter-budget-decides"
        ),
        # All rows refuse to be dimmed: no level would be faster, so none is worth its loss.
        pytest.param(0, setting(tpot_s=0.001), full_step(num_exact=32), 0, id="dimming-that-gains-nothing-is-not-done"),
        # Half of them do: the step takes at least the 57 ms of 16 exact rows, which level 3 reaches as level 4 does.
        pytest.param(0, setting(tpot_s=0.001), full_step(num_exact=16), 3, id="no-deeper-than-helps"),
        pytest.param(3, setting(), full_step(), 3, id="a-lower-level-is-enough-only-now"),
        pytest.param(3, setting(), full_step(idle_s=2 * DOWN_S), 1, id="idle-time-counts-as-enough"),
        pytest.param(3, setting(), full_step(idle_s=100.0), 0, id="idle-for-long"),
    ],
)
def test_truth_table(level_before: int, order: BrownoutSetting, observation: StepObservation, expected: int) -> None:
    _, levels = choose_levels(at_level(level_before), order, observation, now_s=0.0)
    assert levels == Levels(expected, expected)


@pytest.mark.parametrize(
    ("num_prompts", "num_chunks", "num_free_slots", "expected"),
    [(2, 10, 5, 0), (2, 12, 5, 3), (2, 13, 5, TOP), (1, 13, 5, 0), (2, 13, 0, 0)],
)
def test_prompts_that_dimming_hardly_speeds_up_are_dimmed_for_early(
    num_prompts: int, num_chunks: int, num_free_slots: int, expected: int
) -> None:
    """A step of 128 tokens takes 100 ms, 90 at the deepest level: of the promise, 10 s, a queue of prompts may take
    1.11 s. The head start ends with the queue."""
    times_s = tuple((0.01, 0.05 - 0.01 * level, 0.1 - 0.0025 * level) for level in range(TOP + 1))
    state = GovernorState.initial(StepTimeModel((1, 32, 128), times_s))
    waiting = [Waiting(0, 0.0, 96 * num_chunks * n // num_prompts) for n in range(1, num_prompts + 1)]
    seen = full_step(*waiting, num_free_slots=num_free_slots)
    state, levels = choose_levels(state, setting(ttft_s=10.0), seen, 0.0)
    assert levels == Levels(expected, expected)
    assert choose_levels(state, setting(ttft_s=10.0), full_step(), 0.1)[1] == Levels(0, 0)


def test_each_phase_keeps_to_its_own_range() -> None:
    order = BrownoutSetting(prefill=PhaseSetting(0, TOP, 0.001), decode=PhaseSetting(0, 0, ANY_S))
    state, levels = choose_levels(at_level(0), order, full_step(Waiting(0, 0.0, 24)), 0.0)
    assert levels == Levels(prefill=TOP, decode=0)
    order = BrownoutSetting(prefill=PhaseSetting(1, 2, ANY_S), decode=PhaseSetting(3, TOP, ANY_S))
    assert choose_levels(state, order, full_step(), 0.1)[1] == Levels(prefill=2, decode=TOP)


def test_a_level_forbidden_meanwhile_is_forgotten() -> None:
    state, _ = choose_levels(at_level(0), setting(tpot_s=0.001), full_step(), 0.0)
    state, levels = choose_levels(state, setting(0, 0), full_step(), 0.1)
    assert levels == Levels(0, 0)
    assert choose_levels(state, setting(), full_step(), 0.2)[1] == Levels(0, 0)


def test_down_to_what_was_needed_in_the_last_down_s() -> None:
    """A queue that needs level 2 is there for the second half of the wait: from the top to 2, then to 0 at once."""
    order, busy = setting(ttft_s=1.3), full_step(Waiting(10, 0.0, 96))
    state, levels = run_for(DOWN_S / 2, at_level(TOP), order, full_step())
    state, more = run_for(DOWN_S / 2, state, order, busy, start_s=DOWN_S / 2)
    assert set(levels + more) == {TOP}
    state, levels = run_for(0.1, state, order, full_step(), start_s=DOWN_S)
    assert levels == [2, 2]
    _, levels = run_for(2 * DOWN_S, state, order, full_step(), start_s=DOWN_S + 0.1)
    changes = [step for step, (before, after) in enumerate(pairwise([2, *levels])) if before != after]
    assert levels[-1] == 0
    assert len(changes) == 1
    assert changes[0] * 0.05 >= DOWN_S - 0.1 - 1e-9


@pytest.mark.parametrize(("arrivals_per_s", "expected"), [(4.0, 0), (9.0, 2), (100.0, TOP)])
def test_stays_at_the_level_that_carries_the_arrivals(arrivals_per_s: float, expected: int) -> None:
    """A full batch finishes 32 / (64 tokens x m) requests per second: 5, 6.25 and 8.3 at levels 0 to 2, which is to be
    CARRIED_FRAC of those that arrive."""
    state = replace(at_level(TOP), mean_output_tokens=64.0, arrivals_per_s=arrivals_per_s)
    next_arrival_s = 0.0
    for step in range(400):
        now_s = step * 0.05
        while next_arrival_s <= now_s:
            state = observe_arrival(state, next_arrival_s)
            next_arrival_s += 1 / arrivals_per_s
        state, levels = choose_levels(state, setting(), full_step(), now_s)
    assert levels.decode == expected
    state, _ = run_for(30.0, state, setting(), full_step(), start_s=now_s)
    assert state.level == 0  # nothing arrives any more


@pytest.mark.parametrize(("num_held", "expected"), [(10, 0), (28, 0), (29, 2), (40, 2)])
def test_arrivals_raise_the_level_before_a_queue_forms(num_held: int, expected: int) -> None:
    """9 requests/s of 64 tokens need level 2 once the batch is full; while it has room they need nothing yet."""
    state = replace(at_level(0), mean_output_tokens=64.0, arrivals_per_s=9.0, arrived_s=0.0)
    _, levels = choose_levels(state, setting(), full_step(num_held=num_held), 0.0)
    assert levels.decode == expected


def test_a_relapse_starts_the_wait_anew() -> None:
    calm, busy = full_step(), full_step(Waiting(10, 0.0, 96))
    order = setting(ttft_s=1.3)
    state, levels = run_for(DOWN_S - 0.1, at_level(2), order, calm)
    state, relapse = run_for(0.05, state, order, busy, start_s=DOWN_S - 0.1)
    _, after = run_for(DOWN_S, state, order, calm, start_s=DOWN_S - 0.05)
    assert set(levels + relapse + after) == {2}


WAITING = st.builds(
    Waiting, position=st.integers(0, 500), waited_s=st.floats(0.0, 5.0), prefill_tokens=st.integers(1, 20_000)
)
OBSERVATIONS = st.builds(
    StepObservation,
    num_tokens=st.integers(1, 128),
    idle_s=st.just(0.0),
    waiting=st.lists(WAITING, max_size=5),
    num_free_slots=st.integers(0, 32),
    max_num_seqs=st.just(32),
    num_held=st.integers(0, 64),
    num_exact=st.integers(0, 32),
    prefill_tokens_per_step=st.integers(0, 128),
    max_num_batched_tokens=st.just(128),
)
PHASES = st.builds(
    lambda floor, room, budget_s, margin: PhaseSetting(floor, floor + room, budget_s, margin),
    st.integers(0, TOP + 2), st.integers(0, TOP + 2), st.floats(0.01, 3.0), st.floats(0.3, 1.0),
)  # fmt: skip
SETTINGS = st.builds(BrownoutSetting, prefill=PHASES, decode=PHASES)


@given(st.lists(st.tuples(st.floats(0.001, 0.4), SETTINGS, OBSERVATIONS), min_size=1, max_size=30))
def test_levels_stay_in_the_setting_and_on_the_ladder(
    steps: list[tuple[float, BrownoutSetting, StepObservation]],
) -> None:
    state, now_s = GovernorState.initial(MODEL), 0.0
    for step_s, order, observation in steps:
        now_s += step_s
        state, levels = choose_levels(state, order, observation, now_s)
        for phase, level in ((order.prefill, levels.prefill), (order.decode, levels.decode)):
            assert min(phase.floor, TOP) <= level <= min(phase.ceiling, TOP)


@given(st.lists(st.tuples(st.floats(0.001, 0.4), OBSERVATIONS), min_size=2, max_size=60), st.floats(0.05, 3.0))
def test_never_down_twice_within_down_s(steps: list[tuple[float, StepObservation]], ttft_s: float) -> None:
    """But for head starts, which a full batch has not."""
    state, now_s, level, went_down_s = at_level(TOP), 0.0, TOP, -math.inf
    for step_s, observation in steps:
        now_s += step_s
        order = setting(ttft_s=ttft_s, tpot_s=0.05)
        state, levels = choose_levels(state, order, replace(observation, num_free_slots=0), now_s)
        if levels.decode < level:
            assert now_s - went_down_s >= DOWN_S
            went_down_s = now_s
        level = levels.decode


@given(
    OBSERVATIONS,
    st.floats(0.05, 3.0),
    st.integers(0, 500),
    st.floats(0.0, 5.0),
    st.integers(0, 20_000),
)
def test_more_load_never_gets_a_lower_level(
    observation: StepObservation, ttft_s: float, more_ahead: int, more_waited_s: float, more_tokens: int
) -> None:
    def level(waiting: list[Waiting]) -> int:
        return choose_levels(at_level(0), setting(ttft_s=ttft_s), replace(observation, waiting=waiting), 0.0)[1].prefill

    waiting = list(observation.waiting)
    worse = [
        Waiting(w.position + more_ahead, w.waited_s + more_waited_s, w.prefill_tokens + more_tokens) for w in waiting
    ]
    assert level(worse) >= level(waiting)
    assert level([*waiting, Waiting(more_ahead, more_waited_s, more_tokens + 1)]) >= level(waiting)


@given(st.lists(st.tuples(st.floats(0.001, 0.4), OBSERVATIONS), max_size=30), st.floats(0.05, 3.0))
def test_returns_to_zero_when_the_load_vanishes(steps: list[tuple[float, StepObservation]], ttft_s: float) -> None:
    state, now_s, order = GovernorState.initial(MODEL), 0.0, setting(ttft_s=ttft_s, tpot_s=0.05)
    for step_s, observation in steps:
        now_s += step_s
        state, _ = choose_levels(state, order, observation, now_s)
    # Until the average of the step times has forgotten the load, a way down for each level, and a step each to notice.
    settled_s = 6 * SMOOTHING_S + TOP * (DOWN_S + 0.05) + 0.1
    _, levels = run_for(settled_s, state, order, StepObservation(num_tokens=1, max_num_seqs=32), start_s=now_s + 0.05)
    assert levels[-1] == 0


def test_learns_how_long_answers_are() -> None:
    state = at_level(0)
    for _ in range(400):
        state = observe_finish(state, 10)
    assert state.mean_output_tokens == pytest.approx(10, abs=0.1)
    # Short answers free places soon: a queue that needed level 2 needs none.
    assert choose_levels(state, setting(ttft_s=1.3), full_step(Waiting(10, 0.0, 96)), 0.0)[1] == Levels(0, 0)


@given(st.integers(0, 5000))
def test_samples_are_few_and_hold_both_ends(num_waiting: int) -> None:
    positions = sample_positions(num_waiting)
    assert len(positions) == min(num_waiting, MAX_QUEUE_SAMPLES)
    assert positions == sorted(set(positions))
    if num_waiting:
        assert (positions[0], positions[-1]) == (0, num_waiting - 1)
