"""The scheduler without a model: a step appends a token to each sequence that samples."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import SchedulerConfig
from engine.kv_cache.blocks import BlockManager
from engine.scheduler.preempt import choose_victim
from engine.scheduler.scheduler import ScheduledBatch, Scheduler
from engine.scheduler.sequence import Sequence
from engine.types import (
    EngineBusyError,
    GenerationRequest,
    InvalidRequestError,
    Levels,
    Phase,
    SamplingParams,
    ServiceClass,
)

BLOCK_SIZE = 4
VOCAB_SIZE = 50


class Harness:
    """Plays the engine and checks what must hold after every step."""

    def __init__(
        self,
        *,
        num_blocks: int = 65,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = 16,
        prefix: bool = True,
        overlaps: bool = False,
    ) -> None:
        self.config = SchedulerConfig(max_num_seqs, max_num_batched_tokens, max_num_waiting=8)
        self.blocks = BlockManager(num_blocks, BLOCK_SIZE, prefix)
        self.max_model_len = (num_blocks - 1) * BLOCK_SIZE
        self.scheduler = Scheduler(self.config, self.blocks, self.max_model_len, VOCAB_SIZE)
        self.overlaps = overlaps
        self.under_way: ScheduledBatch | None = None
        self.levels = Levels()
        self.now_s = 0.0
        self.num_steps = 0
        self.admitted: list[str] = []  # in order of first admission
        self.finished: list[str] = []
        self.ended: set[str] = set()

    def add(
        self,
        request_id: str,
        prompt: Iterable[int],
        max_tokens: int = 1,
        service_class: ServiceClass = ServiceClass.STANDARD,
        arrival_s: float | None = None,
        prompt_logprobs: int | None = None,
    ) -> Sequence:
        sampling = SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
        request = GenerationRequest(request_id, tuple(prompt), sampling, service_class)
        sequence = Sequence(request, self.now_s if arrival_s is None else arrival_s)
        self.scheduler.add(sequence)
        self.now_s += 0.001
        return sequence

    def step(self) -> ScheduledBatch:
        scheduler = self.scheduler
        new = {s.request_id for s in scheduler.waiting if s.admitted_s is None}
        queue = [s.request_id for s in scheduler.waiting]
        batch = scheduler.schedule(self.now_s)
        self.check(batch)
        admitted = [s.request_id for s in scheduler.running if s.request_id in queue]
        assert admitted == queue[: len(admitted)], "admission is not first come first served"
        self.admitted += [request_id for request_id in admitted if request_id in new]
        for item in batch:
            assert len(self.blocks.block_ids(item.sequence.request_id)) * BLOCK_SIZE >= item.end
        scheduler.launch(batch)
        if self.overlaps:
            batch, self.under_way = self.under_way, batch
        if batch is not None:
            self.finish(batch)
        self.blocks.check_invariants()
        self.now_s += 0.01
        self.num_steps += 1
        return batch or ScheduledBatch()

    def finish(self, batch: ScheduledBatch) -> None:
        self.scheduler.commit(batch, self.levels)
        for item in batch:
            sequence = item.sequence
            if not item.samples or sequence.request_id in self.ended:
                continue
            assert item.end == len(sequence.token_ids)
            sequence.append(1 + sequence.num_generated % (VOCAB_SIZE - 1))
            if sequence.num_generated == sequence.request.sampling.max_tokens:
                self.end(sequence)
                self.finished.append(sequence.request_id)

    def end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self.ended.add(sequence.request_id)

    def check(self, batch: ScheduledBatch) -> None:
        scheduler = self.scheduler
        assert len(batch) > 0 or self.under_way, "a step without work while requests wait"
        assert batch.num_tokens <= self.config.max_num_batched_tokens
        assert len(scheduler.running) <= self.config.max_num_seqs
        assert all(item.num_tokens >= 1 for item in batch)
        ids = [item.sequence.request_id for item in batch]
        assert len(set(ids)) == len(ids)
        assert {s.request_id for s in scheduler.running} >= set(ids)
        decoding = {s.request_id for s in scheduler.running if s.decoding} - {
            item.sequence.request_id
            for item in batch.prefills  # admitted again with all but one token cached
        }
        assert {item.sequence.request_id for item in batch.decodes} == decoding, "a decoding sequence was left out"
        assert all(item.phase is Phase.DECODE and item.num_tokens == 1 for item in batch.decodes)
        assert all(item.phase is Phase.PREFILL for item in batch.prefills)
        assert scheduler.waiting.num_tokens == sum(s.num_uncomputed for s in scheduler.waiting)
        held = {s.request_id for s in scheduler.waiting}
        assert not held & {s.request_id for s in scheduler.running}

    def run(self, max_steps: int = 2000) -> None:
        while self.scheduler.has_work:
            assert self.num_steps < max_steps, "the scheduler makes no progress"
            self.step()
        assert self.blocks.num_used == 0


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 6),  # steps before it arrives
        st.lists(st.integers(0, 2), min_size=1, max_size=24),  # few distinct tokens, so that prefixes are shared
        st.integers(1, 12),
        st.sampled_from(ServiceClass),
    ),
    min_size=1,
    max_size=8,
)


@given(
    requests=REQUESTS,
    num_blocks=st.integers(10, 24),
    max_num_seqs=st.integers(1, 5),
    spare_tokens=st.integers(0, 12),
    prefix=st.booleans(),
    overlaps=st.booleans(),
    levels=st.builds(Levels, st.integers(0, 1), st.integers(0, 1)),
)
def test_every_load_is_served_within_the_limits(
    requests: list[tuple[int, list[int], int, ServiceClass]],
    num_blocks: int,
    max_num_seqs: int,
    spare_tokens: int,
    prefix: bool,
    overlaps: bool,
    levels: Levels,
) -> None:
    harness = Harness(
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + spare_tokens,
        prefix=prefix,
        overlaps=overlaps,
    )
    harness.levels = levels
    arrived = []
    for index, (gap, prompt, max_tokens, service_class) in enumerate(requests):
        for _ in range(gap):
            if harness.scheduler.has_work:
                harness.step()
        arrived.append(harness.add(f"r{index}", prompt, max_tokens, service_class).request_id)
    harness.run()
    assert harness.admitted == arrived
    assert sorted(harness.finished) == sorted(arrived)


@given(
    requests=REQUESTS,
    aborts=st.lists(st.tuples(st.integers(0, 10), st.integers(0, 7)), max_size=6),
    num_blocks=st.integers(10, 16),
    overlaps=st.booleans(),
)
def test_abort_frees_blocks_at_once(
    requests: list[tuple[int, list[int], int, ServiceClass]],
    aborts: list[tuple[int, int]],
    num_blocks: int,
    overlaps: bool,
) -> None:
    harness = Harness(num_blocks=num_blocks, overlaps=overlaps)
    sequences = [
        harness.add(f"r{index}", prompt, max_tokens, service_class)
        for index, (_, prompt, max_tokens, service_class) in enumerate(requests)
    ]
    aborted = set()
    for num_steps, victim in aborts:
        for _ in range(num_steps):
            if harness.scheduler.has_work:
                harness.step()
        sequence = sequences[victim % len(sequences)]
        if sequence.request_id in aborted or sequence.request_id in harness.finished:
            continue
        aborted.add(sequence.request_id)
        harness.end(sequence)
        with pytest.raises(KeyError):
            harness.blocks.block_ids(sequence.request_id)
        harness.blocks.check_invariants()
        assert sequence not in [*harness.scheduler.running, *harness.scheduler.waiting]
    harness.run()
    assert aborted | set(harness.finished) == {sequence.request_id for sequence in sequences}


def test_decodes_come_first_and_prompts_share_what_is_left() -> None:
    harness = Harness(max_num_batched_tokens=10)
    harness.add("old", range(4), max_tokens=9)
    harness.step()
    harness.add("long", range(10, 30), arrival_s=-1.0)  # waited elsewhere before, so it is the oldest
    harness.add("short", range(30, 33))
    steps = [[(item.sequence.request_id, item.num_tokens) for item in harness.step()] for _ in range(3)]
    assert steps == [
        [("old", 1), ("long", 9)],
        [("old", 1), ("long", 9)],
        [("old", 1), ("long", 2), ("short", 3)],
    ]
    assert harness.finished == ["long", "short"]


def test_prompts_whose_logits_are_wanted_share_a_budget_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.scheduler.scheduler.MAX_PROMPT_LOGITS", 6)
    harness = Harness()
    harness.add("plain", range(4))
    for name in ("first", "second"):
        harness.add(name, range(8), prompt_logprobs=0)
    taken = [[(i.sequence.request_id, i.num_tokens) for i in harness.step()] for _ in range(3)]
    assert taken == [[("plain", 4), ("first", 6)], [("first", 2), ("second", 4)], [("second", 4)]]
    assert harness.finished == ["plain", "first", "second"]


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks() -> None:
    harness = Harness(max_num_seqs=1, max_num_batched_tokens=8)
    harness.add("a", range(21), max_tokens=2)
    assert [harness.step().num_tokens for _ in range(4)] == [8, 8, 5, 1]
    assert harness.finished == ["a"]


def test_a_wholly_cached_prompt_computes_one_block_for_its_logits() -> None:
    harness = Harness()
    prompt = range(3 * BLOCK_SIZE)
    harness.add("first", prompt, max_tokens=3)
    harness.run()
    again = harness.add("again", prompt, max_tokens=3)
    batch = harness.step()
    assert (batch.num_prefill_tokens, again.num_cached) == (BLOCK_SIZE, 2 * BLOCK_SIZE)
    harness.run()
    assert harness.finished == ["first", "again"]


def test_a_shared_prefix_needs_no_room_of_its_own() -> None:
    harness = Harness(num_blocks=16, max_num_batched_tokens=64)
    prefix = range(40)
    first = harness.add("a", prefix, max_tokens=8)
    harness.step()
    second = harness.add("b", [*prefix, 1, 2, 3], max_tokens=4)  # 11 blocks, of which 10 are the other's; 4 are free
    third = harness.add("c", [7] * 20)
    harness.step()
    assert [s.request_id for s in harness.scheduler.running] == ["a", "b"]
    assert (second.num_cached, first.num_cached) == (40, 0)
    assert third.admitted_s is None
    harness.blocks.check_invariants()


def test_the_pool_may_hold_just_one_sequence() -> None:
    harness = Harness(num_blocks=4)
    for name in "abc":
        harness.add(name, range(9), max_tokens=3)
    harness.run()
    assert harness.finished == ["a", "b", "c"]


def test_the_latest_arrival_is_preempted_keeps_its_turn_and_finishes() -> None:
    harness = Harness(num_blocks=8)
    old = harness.add("old", range(9), max_tokens=12)
    young = harness.add("young", range(20, 29), max_tokens=12)
    harness.add("waiting", range(30, 48), max_tokens=1)
    while harness.step().num_preempted == 0:
        assert young in harness.scheduler.running
    assert old in harness.scheduler.running
    assert [s.request_id for s in harness.scheduler.waiting] == ["young", "waiting"]
    assert young.num_computed == 0
    num_generated = young.num_generated
    assert num_generated > 0
    harness.run()
    assert harness.finished == ["old", "young", "waiting"]
    assert young.num_generated == 12


def test_a_preempted_sequence_shares_its_prefix_with_others_and_leaves_theirs_alone() -> None:
    harness = Harness(num_blocks=8)
    shared = range(2 * BLOCK_SIZE)
    harness.add("first", [*shared, 40], max_tokens=14)
    harness.step()
    second = harness.add("second", [*shared, 41], max_tokens=14)
    harness.step()
    assert second.num_cached == 2 * BLOCK_SIZE
    assert harness.blocks.block_ids("first")[:2] == harness.blocks.block_ids("second")[:2]
    harness.run()
    assert harness.finished == ["first", "second"]


def test_of_equal_arrivals_the_last_admitted_is_the_victim() -> None:
    sequences = [Sequence(GenerationRequest(name, (1,)), arrival_s=0.0) for name in "abc"]
    assert choose_victim(sequences).request_id == "c"
    older = Sequence(GenerationRequest("older", (1,)), arrival_s=-1.0)
    assert choose_victim([*sequences, older]).request_id == "c"


def test_simultaneous_arrivals_do_not_evict_each_other_for_ever() -> None:
    harness = Harness(num_blocks=10, max_num_batched_tokens=6, prefix=False)
    for name in "abcd":
        harness.add(name, range(12), max_tokens=20, arrival_s=0.0)
    harness.run(max_steps=200)
    assert harness.finished == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("prompt", "sampling", "param"),
    [
        ((), SamplingParams(), "prompt"),
        (tuple([1] * 40), SamplingParams(max_tokens=1), "prompt"),
        (tuple([1] * 30), SamplingParams(max_tokens=11), "max_tokens"),
        ((1, VOCAB_SIZE), SamplingParams(max_tokens=1), "prompt"),
        ((-1, 1), SamplingParams(max_tokens=1), "prompt"),
        ((1,), SamplingParams(max_tokens=1, logit_bias=((VOCAB_SIZE, 1.0),)), "logit_bias"),
    ],
)
def test_what_can_never_be_served_is_refused(prompt: tuple[int, ...], sampling: SamplingParams, param: str) -> None:
    harness = Harness(num_blocks=11)
    with pytest.raises(InvalidRequestError) as refusal:
        harness.scheduler.add(Sequence(GenerationRequest("a", prompt, sampling), 0.0))
    assert refusal.value.param == param
    assert not harness.scheduler.has_work


def test_the_longest_possible_request_is_served() -> None:
    harness = Harness(num_blocks=11)
    harness.add("a", [1] * 30, max_tokens=10)
    harness.run()
    assert harness.finished == ["a"]


def test_the_least_priority_value_is_admitted_first_and_preempted_last() -> None:
    harness = Harness(max_num_seqs=1)
    for name, priority in (("low", 5), ("first", 0), ("urgent", -1), ("second", 0)):
        request = GenerationRequest(name, (1, 2), SamplingParams(max_tokens=2), priority=priority)
        harness.scheduler.add(Sequence(request, harness.now_s))
    harness.run()
    assert harness.admitted == ["urgent", "first", "second", "low"]
    running = [Sequence(GenerationRequest(n, (1,), priority=p), t) for n, p, t in (("a", 1, 0.0), ("b", 0, 1.0))]
    assert choose_victim(running).request_id == "a"


def test_a_prompt_whose_logprobs_are_wanted_is_computed_whole() -> None:
    harness = Harness()
    prompt = tuple(range(20))
    harness.add("warm", prompt)
    harness.run()
    asks = Sequence(GenerationRequest("asks", prompt, SamplingParams(max_tokens=1, prompt_logprobs=0)), harness.now_s)
    harness.scheduler.add(asks)
    cached = harness.add("cached", prompt)
    harness.run()
    assert (asks.num_cached, cached.num_cached) == (0, 16)


def test_a_full_queue_is_busy() -> None:
    harness = Harness()
    for index in range(8):
        harness.add(f"r{index}", [1])
    with pytest.raises(EngineBusyError, match="8 requests are waiting, the most is 8"):
        harness.add("late", [1])
    harness.run()
    assert len(harness.finished) == 8
