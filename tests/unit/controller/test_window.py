"""Aggregation: what counts once counts once, what is old is forgotten, and memory does not grow with time."""

from __future__ import annotations

from typing import Any

import pytest

from controller.reports import ClassWindow, Hello, PhaseWindow, ShapeWindow, StepWindow
from controller.sketch import QuantileSketch
from controller.types import Phase
from controller.window import MAX_REMEMBERED_REPLICAS, PANES_PER_WINDOW, ModelWindow, Verdict


def hello(replica_id: str = "a", incarnation: int = 1, num_levels: int = 5, measured: bool = True) -> Hello:
    return Hello(replica_id, "model", incarnation, num_levels, measured)


def report(replica_id: str = "a", sequence: int = 1, incarnation: int = 1, **fields: Any) -> StepWindow:
    return StepWindow(replica_id, "model", incarnation, sequence, **{"window_s": 0.25, **fields})


def decode(*step_times_s: float, tokens: int = 1, level: int = 0) -> dict[Phase, PhaseWindow]:
    num_tokens = tokens * len(step_times_s)
    sketch = QuantileSketch.of(step_times_s)
    return {Phase.DECODE: PhaseWindow(len(step_times_s), num_tokens, level * num_tokens, level, sketch)}


@pytest.fixture
def window() -> ModelWindow:
    window = ModelWindow(window_s=10.0, stale_after_s=1.0)
    window.join(hello("a"), now_s=100.0)
    return window


def test_nothing_observed_is_unknown(window: ModelWindow) -> None:
    seen = window.observe(100.0)
    assert (seen.num_replicas, seen.num_stale, seen.num_levels, seen.ladder_measured) == (1, 0, 5, True)
    assert seen.decode.step_time_p90_s is None
    assert seen.ttft_p90_s is None and seen.tpot_p90_s is None


def test_replicas_add_up(window: ModelWindow) -> None:
    window.join(hello("b", num_levels=3, measured=False), now_s=100.0)
    standard = ClassWindow(2, 1, 1, 2, ttft_s=QuantileSketch.of([0.1, 0.2]), tpot_s=QuantileSketch.of([0.01]))
    full = ClassWindow(1, 0, 0, 1, ttft_s=QuantileSketch.of([0.4]))
    gauges = {"num_running": 2, "num_waiting": 3, "queued_prefill_tokens": 50, "routed_pairs": 100, "dimmed_pairs": 10}
    window.offer(report("a", phases=decode(0.01, 0.02), classes={"standard": standard}, **gauges), 100.1)
    window.offer(
        report(
            "b",
            phases=decode(0.03, tokens=2, level=2),
            classes={"full": full},
            oldest_wait_s=0.7,
            kv_used_frac=0.5,
            level_decode=2,
            **gauges,
        ),
        100.2,
    )
    seen = window.observe(100.3)
    assert (seen.num_replicas, seen.num_levels, seen.ladder_measured) == (2, 3, False)
    assert (seen.decode.num_steps, seen.decode.num_tokens, seen.decode.level_peak) == (3, 4, 2)
    assert seen.decode.level_mean == 1.0
    assert seen.decode.step_time_p50_s == pytest.approx(0.02, rel=0.01)
    assert (seen.num_finished, seen.num_failed) == (3, 1)
    assert seen.ttft_p99_s == pytest.approx(0.2, rel=0.01)
    assert (seen.num_running, seen.num_waiting, seen.queued_prefill_tokens) == (4, 6, 100)
    assert (seen.oldest_wait_s, seen.kv_used_frac) == (0.7, 0.5)
    assert (seen.routed_pairs, seen.dimmed_pairs) == (200, 20)
    assert (seen.level_now, seen.level_peak_now) == (1.0, 2)


def test_verdicts(window: ModelWindow) -> None:
    assert window.offer(report(sequence=1, phases=decode(0.01)), 100.0) is Verdict.ACCEPTED
    assert window.offer(report(sequence=3, phases=decode(0.01)), 100.1) is Verdict.ACCEPTED
    assert window.offer(report(sequence=3, phases=decode(0.01)), 100.2) is Verdict.DUPLICATE
    assert window.offer(report(sequence=2, phases=decode(0.01)), 100.2) is Verdict.OUT_OF_ORDER
    assert window.offer(report(sequence=4, incarnation=9, phases=decode(0.01)), 100.2) is Verdict.WRONG_LIFE
    assert window.offer(report("stranger", phases=decode(0.01)), 100.2) is Verdict.WRONG_LIFE
    assert window.offer(report(sequence=5, window_s=60.0, num_running=7, phases=decode(9.9)), 100.3) is Verdict.TOO_LONG
    assert window.num_windows == {
        Verdict.ACCEPTED: 2,
        Verdict.DUPLICATE: 1,
        Verdict.OUT_OF_ORDER: 1,
        Verdict.WRONG_LIFE: 2,
        Verdict.TOO_LONG: 1,
        Verdict.NONSENSE: 0,
        Verdict.QUARANTINED: 0,
    }
    seen = window.observe(100.3)
    assert seen.decode.num_steps == 2
    assert seen.num_running == 7


def test_a_reconnect_does_not_count_twice_but_a_new_life_starts_anew(window: ModelWindow) -> None:
    window.offer(report(sequence=5), 100.0)
    window.leave("a")
    window.join(hello("a"), 101.0)
    assert window.offer(report(sequence=5), 101.0) is Verdict.DUPLICATE
    assert window.offer(report(sequence=6), 101.0) is Verdict.ACCEPTED
    window.leave("a")
    window.join(hello("a", incarnation=2), 102.0)
    assert window.offer(report(sequence=1, incarnation=2), 102.0) is Verdict.ACCEPTED


def test_old_samples_age_out_and_a_law_may_look_at_less(window: ModelWindow) -> None:
    window.offer(report(sequence=1, phases=decode(0.5)), 100.0)
    window.offer(report(sequence=2, phases=decode(0.1)), 108.0)
    assert window.observe(108.0).decode.num_steps == 2
    assert window.observe(108.0, window_s=2.0).decode.num_steps == 1
    assert window.observe(111.0).decode.num_steps == 1
    assert window.observe(119.0).decode.step_time_p90_s is None


def test_a_silent_replica_is_stale_and_its_gauges_are_unknown(window: ModelWindow) -> None:
    window.offer(report(num_waiting=9, phases=decode(0.1)), 100.0)
    assert window.observe(100.9).num_waiting == 9
    seen = window.observe(101.1)
    assert (seen.num_replicas, seen.num_stale, seen.num_waiting) == (1, 1, 0)
    assert seen.decode.num_steps == 1


def test_what_a_replica_reported_outlives_it(window: ModelWindow) -> None:
    window.offer(report(phases=decode(0.1)), 100.0)
    window.leave("a")
    seen = window.observe(100.5)
    assert (seen.num_replicas, seen.decode.num_steps) == (0, 1)


def test_memory_is_bounded(window: ModelWindow) -> None:
    for sequence in range(1, 2000):
        window.offer(report(sequence=sequence, phases=decode(0.1)), 100.0 + sequence)
    for i in range(MAX_REMEMBERED_REPLICAS + 10):
        window.join(hello(f"r{i}"), 3000.0)
        window.offer(report(f"r{i}"), 3000.0)
        window.leave(f"r{i}")
    assert len(window._panes) <= PANES_PER_WINDOW + 1
    assert len(window._memory) == MAX_REMEMBERED_REPLICAS


def test_nonsense_quarantines_and_sound_reports_redeem(window: ModelWindow) -> None:
    window.offer(report(sequence=1, num_running=3), 100.0)
    for _ in range(2):
        window.refuse("a")
    seen = window.observe(100.1)
    assert (seen.num_quarantined, seen.num_stale, seen.num_running) == (0, 0, 3)
    window.refuse("a")
    seen = window.observe(100.1)
    assert (seen.num_quarantined, seen.num_stale, seen.num_running) == (1, 1, 0), "nothing it says counts"
    sequence = 2
    while window.replicas["a"].trust.count > 1:
        verdict = window.offer(report(sequence=sequence, num_running=3, phases=decode(0.01)), 100.2)
        assert verdict is Verdict.QUARANTINED
        sequence += 1
    assert window.observe(100.2).decode.num_steps == 0
    assert window.offer(report(sequence=sequence, num_running=3), 100.3) is Verdict.ACCEPTED
    seen = window.observe(100.3)
    assert (seen.num_quarantined, seen.num_stale, seen.num_running) == (0, 0, 3)


def test_a_reconnect_does_not_end_the_quarantine_but_a_new_life_does(window: ModelWindow) -> None:
    window.offer(report(sequence=9), 100.0)
    for _ in range(3):
        window.offer(report(sequence=4), 100.0)
    window.leave("a")
    window.join(hello("a"), 101.0)
    assert window.observe(101.0).num_quarantined == 1
    window.leave("a")
    window.join(hello("a", incarnation=2), 102.0)
    assert window.observe(102.0).num_quarantined == 0


def test_what_is_spent_only_grows_and_late_reports_count(window: ModelWindow) -> None:
    spent = {"standard": ClassWindow(num_tokens=10, loss_nats=0.5)}
    window.offer(report(sequence=1, classes=spent), 100.0)
    window.offer(report(sequence=2, classes=spent, window_s=60.0), 160.0)
    seen = window.observe(500.0)
    assert (seen.spent["standard"].num_tokens, seen.spent["standard"].loss_nats) == (20, 1.0)
    assert seen.observed_s == 60.25


def test_evidence_is_a_step(window: ModelWindow) -> None:
    assert window.observe(103.0).evidence_age_s == 3.0, "counted from the first join"
    window.offer(report(sequence=1, phases=decode(0.01)), 104.0)
    window.offer(report(sequence=2), 105.0)
    assert window.observe(106.0).evidence_age_s == 2.0


def test_shapes_and_predictions_add_up(window: ModelWindow) -> None:
    phase = PhaseWindow(2, 8, step_time_s=QuantileSketch.of([0.1, 0.1]), shapes={2: ShapeWindow(2, 0.2)})
    ratio = QuantileSketch.of([1.0, 2.0, 2.0])
    for sequence in (1, 2):
        parts = {"phases": {Phase.DECODE: phase}, "measured_per_predicted": ratio}
        window.offer(report(sequence=sequence, **parts), 100.0 + sequence)
    assert window.samples(103.0).phases[Phase.DECODE].shapes == {2: ShapeWindow(4, 0.4)}
    assert window.observe(103.0).measured_per_predicted_p90 == pytest.approx(2.0, rel=0.01)
    assert phase.shapes == {2: ShapeWindow(2, 0.2)}, "adding changes no report"
