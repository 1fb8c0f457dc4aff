from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.brownout import Brownout
from engine.config import BrownoutConfig, EngineConfig, ModelConfig, SchedulerConfig, SloConfig
from engine.kv_cache.blocks import BlockManager
from engine.scheduler.scheduler import ScheduledBatch, Scheduler
from engine.scheduler.sequence import Sequence
from engine.step_time import StepTimeModel
from engine.types import BrownoutSetting, GenerationRequest, Levels, PhaseSetting, ServiceClass

CONFIG = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=8)
MODEL = StepTimeModel((1, 8), ((0.01, 0.08), (0.01, 0.04), (0.01, 0.02)))
ANY_S = float("inf")


def make_brownout(may_dim: bool = True, safe_policy: str = "exact", slo: SloConfig | None = None) -> Brownout:
    brownout = BrownoutConfig(safe_policy=safe_policy)
    config = EngineConfig(ModelConfig("any"), scheduler=CONFIG, slo=slo or SloConfig(), brownout=brownout)
    return Brownout(MODEL, config, may_dim)


def make_scheduler(*sequences: Sequence) -> Scheduler:
    scheduler = Scheduler(CONFIG, BlockManager(33, 4), max_model_len=128, vocab_size=100)
    for sequence in sequences:
        scheduler.add(sequence)
    return scheduler


def sequence(name: str, num_tokens: int = 4, arrival_s: float = 0.0, full: bool = False) -> Sequence:
    service_class = ServiceClass.FULL if full else ServiceClass.STANDARD
    return Sequence(GenerationRequest(name, tuple(range(num_tokens)), service_class=service_class), arrival_s)


def pinned(level: int, epoch: int = 0, version: int = 0, lease_s: float = ANY_S) -> BrownoutSetting:
    phase = PhaseSetting(level, level, ANY_S)
    return BrownoutSetting(phase, phase, epoch, version, lease_s)


def ttft(ttft_s: float) -> BrownoutSetting:
    return BrownoutSetting(PhaseSetting(0, 2, ttft_s, margin=1.0), PhaseSetting(0, 2, ANY_S), version=1)


def step(brownout: Brownout, scheduler: Scheduler, now_s: float) -> tuple[Levels, ScheduledBatch]:
    batch = scheduler.schedule(now_s)
    return brownout.choose(scheduler, batch, now_s), batch


@pytest.mark.parametrize(
    ("in_force", "offered", "accepted"),
    [
        ((0, 5), (0, 6), True),
        ((0, 5), (0, 4), False),
        ((0, 5), (1, 0), True),  # a new epoch counts from anew
        ((1, 0), (0, 9), False),
        ((1, 3), (1, 3), True),  # the same again renews the lease
    ],
)
def test_settings_are_ordered(in_force: tuple[int, int], offered: tuple[int, int], accepted: bool) -> None:
    brownout = make_brownout()
    assert brownout.apply(pinned(1, *in_force), 0.0)
    assert brownout.apply(pinned(2, *offered), 0.0) is accepted
    assert (brownout.newest.epoch, brownout.newest.version) == (offered if accepted else in_force)


def test_the_safe_policy_follows_the_lease_and_a_renewal_ends_it() -> None:
    brownout = make_brownout()
    brownout.apply(pinned(2, version=7, lease_s=10.0), 100.0)
    assert brownout.setting(110.0).version == 7
    assert not brownout.lease_expired(110.0)
    assert brownout.lease_expired(110.1)
    scheduler = make_scheduler(sequence("a", 20))
    assert step(brownout, scheduler, 105.0)[0] == Levels(2, 2)
    assert step(brownout, scheduler, 110.1)[0] == Levels(0, 0)
    assert brownout.apply(pinned(2, version=7, lease_s=10.0), 111.0)
    assert step(brownout, scheduler, 111.1)[0] == Levels(2, 2)
    assert not brownout.apply(pinned(1, version=6), 130.0)  # an expired setting still bars older ones


@pytest.mark.parametrize(
    ("last", "tpot_s", "expected"),
    [
        (pinned(2, lease_s=1.0), 1.0, 0),  # fast enough undimmed
        (pinned(2, lease_s=1.0), 1e-6, 2),
        (pinned(1, lease_s=1.0), 1e-6, 1),  # never deeper than the last setting allowed
        (pinned(0, lease_s=1.0), 1e-6, 0),  # switched off stays off
    ],
)
def test_without_a_controller_the_governor_keeps_the_slo_alone(
    last: BrownoutSetting, tpot_s: float, expected: int
) -> None:
    brownout = make_brownout(safe_policy="governor", slo=SloConfig(ttft_s=100.0, tpot_s=tpot_s))
    brownout.apply(last, 0.0)
    scheduler = make_scheduler(sequence("a", 20, arrival_s=2.0))
    assert step(brownout, scheduler, 2.0)[0] == Levels(expected, expected)


def test_an_engine_that_may_not_dim_stays_exact_but_still_predicts() -> None:
    brownout = make_brownout(may_dim=False)
    brownout.apply(pinned(2, version=1), 0.0)
    assert step(brownout, make_scheduler(sequence("a", 8)), 0.0)[0] == Levels(0, 0)
    assert brownout.predicted_step_s(0) == pytest.approx(0.08)


def test_a_prompt_in_the_batch_keeps_its_ttft_too() -> None:
    scheduler = make_scheduler(sequence("a", 40))  # 5 steps of 8 tokens, 80 ms each at level 0
    brownout = make_brownout()
    brownout.apply(ttft(0.41), 0.0)
    assert step(brownout, scheduler, 0.0)[0] == Levels(0, 0)
    brownout.apply(ttft(0.3), 0.0)
    assert step(brownout, scheduler, 0.0)[0] == Levels(1, 1)


def test_a_preempted_request_that_has_its_first_token_does_not_count_as_waiting() -> None:
    late = sequence("a", 8, arrival_s=-100.0)
    late.first_token_s = -50.0
    brownout = make_brownout()
    brownout.apply(ttft(0.5), 0.0)
    assert step(brownout, make_scheduler(sequence("b", 8), late), 0.0)[0] == Levels(0, 0)


def test_idle_time_ends_dimming() -> None:
    brownout = make_brownout()
    brownout.apply(ttft(0.1), 0.0)
    levels, batch = step(brownout, make_scheduler(sequence("a", 40)), 0.0)
    assert levels == Levels(2, 2)
    brownout.learn_step(batch, levels, 3.0, 3.0)  # a long step is not idleness
    assert step(brownout, make_scheduler(sequence("b", 4, arrival_s=3.0)), 3.0)[0] == Levels(2, 2)
    assert step(brownout, make_scheduler(sequence("c", 4, arrival_s=9.0)), 9.0)[0] == Levels(0, 0)


@pytest.mark.parametrize(("num_full", "num_standard", "learns_of"), [(0, 2, 2), (1, 1, 2), (2, 0, 0)])
def test_a_step_teaches_what_ran(num_full: int, num_standard: int, learns_of: int) -> None:
    """A step that took what the model says of it changes nothing: rows that refuse are level 0's, or bound the rest."""
    sequences = [sequence(f"full-{i}", full=True) for i in range(num_full)]
    sequences += [sequence(f"standard-{i}") for i in range(num_standard)]
    brownout = make_brownout()
    brownout.apply(pinned(2, version=1), 0.0)
    _, batch = step(brownout, make_scheduler(*sequences), 0.0)
    assert batch.num_tokens == 8
    num_exact = 4 * num_full
    brownout.learn_step(batch, brownout.levels, MODEL.predict_s(learns_of, 8, num_exact if learns_of else 0), 1.0)
    assert brownout.governor.model == MODEL
    brownout.learn_step(batch, brownout.levels, 1.5 * MODEL.predict_s(learns_of, 8, num_exact if learns_of else 0), 2.0)
    learnt = brownout.governor.model
    assert learnt.predict_s(learns_of, 8, num_exact) > MODEL.predict_s(learns_of, 8, num_exact)
    assert (learnt.saving == 1.0) is (num_full > 0)  # exact rows hide how much the level saves


def test_requests_that_refuse_do_not_make_the_others_pay() -> None:
    """With every row exact no level would help, however late the queue is."""
    brownout = make_brownout()
    brownout.apply(ttft(0.01), 0.0)
    scheduler = make_scheduler(*(sequence(f"full-{i}", full=True) for i in range(6)))
    assert step(brownout, scheduler, 5.0)[0] == Levels(0, 0)


def test_a_step_at_two_levels_teaches_nothing() -> None:
    brownout = make_brownout()
    brownout.apply(BrownoutSetting(PhaseSetting(0, 0, ANY_S), PhaseSetting(2, 2, ANY_S), version=1), 0.0)
    scheduler = make_scheduler(sequence("a"))
    _, batch = step(brownout, scheduler, 0.0)
    scheduler.launch(batch)
    scheduler.commit(batch, Levels())
    scheduler.running[0].append(1)
    scheduler.add(sequence("b"))
    levels, batch = step(brownout, scheduler, 0.1)
    assert (levels, len(batch.decodes), len(batch.prefills)) == (Levels(0, 2), 1, 1)
    brownout.learn_step(batch, brownout.levels, 9.0, 9.0)
    assert brownout.governor.model.trim == 1.0


places = st.tuples(st.integers(0, 3), st.integers(0, 5))


@given(st.lists(places, min_size=1, max_size=12).flatmap(lambda sent: st.tuples(st.just(sent), st.permutations(sent))))
def test_settings_in_whatever_order_end_with_the_newest(deliveries: tuple[list[tuple[int, int]], ...]) -> None:
    """Settings are totally ordered: two streams, resent or delayed, cannot leave two replicas with different orders."""
    sent, shuffled = deliveries
    ends = []
    for order in (sent, shuffled):
        brownout = make_brownout()
        in_force = []
        for epoch, version in order:
            brownout.apply(pinned((epoch + version) % 3, epoch, version), 0.0)
            in_force.append((brownout.newest.epoch, brownout.newest.version))
        assert in_force == sorted(in_force)
        ends.append(brownout.newest)
    assert ends[0] == ends[1]
    assert (ends[0].epoch, ends[0].version) == max(sent)
