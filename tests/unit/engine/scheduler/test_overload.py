"""What is done when dimming is not enough: deadline order, early refusal, growing chunks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import ConfigError, SchedulerConfig
from engine.governor import GovernorState, StepObservation, Waiting, choose_budget
from engine.kv_cache.blocks import BlockManager
from engine.scheduler.pace import PromptPace
from engine.scheduler.queue import WaitingQueue
from engine.scheduler.scheduler import MAX_PASSED_OVER, Scheduler
from engine.scheduler.sequence import Sequence
from engine.step_time import StepTimeModel
from engine.types import BrownoutSetting, EngineBusyError, GenerationRequest, Levels, PhaseSetting


def sequence(name: str, num_tokens: int = 4, arrival_s: float = 0.0, priority: int = 0) -> Sequence:
    return Sequence(GenerationRequest(name, (1,) * num_tokens, priority=priority), arrival_s)


def make_scheduler(**options: float) -> Scheduler:
    config = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=8, **options)  # type: ignore[arg-type]
    return Scheduler(config, BlockManager(65, 4), max_model_len=256, vocab_size=10)


def run_step(scheduler: Scheduler, now_s: float) -> list[str]:
    """Schedule and compute; a finished prompt's request ends at once. Returns whose tokens ran."""
    batch = scheduler.schedule(now_s)
    scheduler.launch(batch)
    scheduler.commit(batch, Levels())
    for item in batch:
        if item.samples:
            scheduler.remove(item.sequence)
    return [item.sequence.request_id for item in batch]


def order(scheduler: Scheduler, start_s: float, step_s: float, num_steps: int) -> list[str]:
    return [name for step in range(num_steps) for name in run_step(scheduler, start_s + step * step_s)]


@pytest.mark.parametrize(
    ("deadline_s", "expected"),
    [
        pytest.param(None, ["old", "new", "newest"], id="first-come-first-served"),
        pytest.param(1.0, ["new", "newest", "old"], id="those-beyond-hope-last"),
        pytest.param(0.1, ["old", "new", "newest"], id="all-late-keep-their-order"),
    ],
)
def test_deadline_order(deadline_s: float | None, expected: list[str]) -> None:
    scheduler = make_scheduler(deadline_s=deadline_s)  # type: ignore[arg-type]
    for name, arrival_s in (("old", -0.95), ("new", -0.2), ("newest", -0.1)):
        scheduler.add(sequence(name, arrival_s=arrival_s))
    assert order(scheduler, 0.06, 0.01, 3) == expected


def test_a_long_prompt_is_late_as_soon_as_it_cannot_be_computed_in_time() -> None:
    scheduler = make_scheduler(deadline_s=1.0)
    scheduler.add(sequence("teacher", 24))
    assert order(scheduler, 0.0, 0.2, 3) == ["teacher"] * 3  # 25 ms per token
    scheduler.add(sequence("long", 32, arrival_s=0.3))  # needs 0.8 s, has 0.7 s
    scheduler.add(sequence("short", 8, arrival_s=0.5))
    assert order(scheduler, 0.6, 0.2, 2) == ["short", "long"]


def test_nobody_is_passed_over_for_ever() -> None:
    scheduler = make_scheduler(deadline_s=1.0)
    scheduler.add(sequence("late", arrival_s=-2.0))
    ran: list[str] = []
    for step in range(200):
        now_s = step * 0.1
        scheduler.add(sequence(f"fresh-{step}", arrival_s=now_s))
        ran += run_step(scheduler, now_s)
        if "late" in ran:
            break
    assert now_s == pytest.approx(MAX_PASSED_OVER - 2.0, abs=0.11)


def test_who_would_wait_too_long_is_refused_and_told_for_how_long() -> None:
    scheduler = make_scheduler(shed_after_s=1.0)
    scheduler.add(sequence("first", 40))
    order(scheduler, 0.0, 0.2, 4)  # 25 ms per token
    scheduler.add(sequence("second", 24))  # behind 8 tokens: 0.8 s
    with pytest.raises(EngineBusyError) as refused:
        scheduler.add(sequence("third", 16))  # 1.2 s
    assert refused.value.retry_after_s == pytest.approx(0.2, abs=0.01)
    assert [s.request_id for s in scheduler.waiting] == ["second"]


def test_nothing_is_refused_before_anything_is_known() -> None:
    scheduler = make_scheduler(shed_after_s=0.001)
    for index in range(20):
        scheduler.add(sequence(str(index), 100))
    assert len(scheduler.waiting) == 20


names = st.integers(0, 9).map(str)
operations = st.one_of(
    st.tuples(st.just("push"), names, st.integers(1, 9), st.integers(-1, 1)),
    st.tuples(st.just("remove"), names),
    st.tuples(st.just("pop")),
    st.tuples(st.just("relegate"), st.integers(0, 9)),
    st.tuples(st.just("recall"), st.integers(0, 9)),
)


@given(st.lists(operations, max_size=60))
def test_the_queue_loses_nobody_and_counts_right(steps: list[tuple]) -> None:
    queue, held = WaitingQueue(), {}
    for kind, *arguments in steps:
        if kind == "push" and arguments[0] not in held:
            name, num_tokens, priority = arguments
            held[name] = sequence(name, num_tokens, priority=priority)
            queue.push(held[name])
        elif kind == "remove":
            assert queue.remove(arguments[0]) is held.pop(arguments[0], None)
        elif kind == "pop" and held:
            assert queue.peek() is next(iter(queue))
            assert held.pop(queue.pop().request_id)
        elif kind == "relegate":
            queue.relegate(lambda s, most=arguments[0]: s.num_uncomputed > most)
        elif kind == "recall":
            queue.recall(lambda s, least=arguments[0]: s.num_uncomputed <= least)
        assert {s.request_id for s in queue} == set(held)
        assert len(queue) == len(held)
        assert queue.num_tokens == sum(s.num_uncomputed for s in held.values())
        assert 0 <= queue.num_tokens_on_time <= queue.num_tokens


def test_priorities_hold_among_those_on_time_and_among_the_late() -> None:
    queue = WaitingQueue()
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", 0)):
        queue.push(sequence(name, priority=priority))
    queue.relegate(lambda s: s.request_id in "bc")
    assert [s.request_id for s in queue] == ["d", "a", "b", "c"]


def test_admission_pace_counts_when_places_are_what_is_short() -> None:
    pace = PromptPace()
    for step in range(40):
        pace.note_step(step * 0.1, 1, num_tokens=2, budget=8, num_admitted_tokens=1, has_queue=True)
    assert pace.ttft_s(50, 4) == pytest.approx(5.0, rel=0.1)


def test_an_idle_hour_does_not_make_prompts_look_slow() -> None:
    pace = PromptPace()
    pace.note_step(0.0, 0, num_tokens=8, budget=8, num_admitted_tokens=8, has_queue=True)
    pace.note_step(0.1, 1, num_tokens=8, budget=8, num_admitted_tokens=8, has_queue=False)
    known_s = pace.compute_s(8)
    assert known_s == pytest.approx(0.1)
    pace.note_step(3600.0, 0, num_tokens=8, budget=8, num_admitted_tokens=8, has_queue=False)
    assert pace.compute_s(8) == known_s


MODEL = StepTimeModel((8, 64), ((0.008, 0.036), (0.006, 0.034)))


@pytest.mark.parametrize(
    ("waiting", "tpot_s", "expected"),
    [
        pytest.param((), 1.0, 8, id="no-queue-usual-step"),
        pytest.param((Waiting(0, 0.0, 64),), 1.0, 8, id="in-time-with-usual-steps"),
        pytest.param((Waiting(0, 0.0, 640),), 1.0, 64, id="late-grow"),
        pytest.param((Waiting(0, 0.0, 640),), 0.025, 32, id="as-far-as-the-pace-allows"),
        pytest.param((Waiting(0, 0.0, 640),), 0.001, 8, id="never-below-the-usual-step"),
    ],
)
def test_chunks_grow_when_prompts_would_be_late(waiting: tuple[Waiting, ...], tpot_s: float, expected: int) -> None:
    setting = BrownoutSetting(PhaseSetting(0, 1, 0.5, margin=1.0), PhaseSetting(0, 1, tpot_s, margin=1.0))
    for present in (8, 64):  # whatever the budget is now
        seen = StepObservation(8, waiting=waiting, prefill_tokens_per_step=present, max_num_batched_tokens=present)
        assert choose_budget(GovernorState.initial(MODEL), setting, seen, 8, 64) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_tokens": 4, "max_num_seqs": 8}, "scheduler.chunk_tokens is 4"),
        ({"chunk_tokens": 1024}, "scheduler.chunk_tokens is 1024"),
        ({"deadline_s": 0.0}, "scheduler.deadline_s is 0.0"),
        ({"shed_after_s": -1.0}, "scheduler.shed_after_s is -1.0"),
    ],
)
def test_bad_options_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SchedulerConfig(**options)  # type: ignore[arg-type]
