"""The recorder: every sample lands in exactly one window, and windows and totals agree."""

from __future__ import annotations

import math
import threading

import pytest

from engine.config import SloConfig
from engine.sketch import RELATIVE_ERROR, QuantileSketch
from engine.telemetry import ExpertLoad, StepRecord, StepWindow, TelemetryRecorder
from engine.types import EngineStats, Levels, Phase, ServiceClass


@pytest.fixture
def recorder() -> TelemetryRecorder:
    return TelemetryRecorder(SloConfig(ttft_s=1.0, tpot_s=0.1), now_s=10.0)


def drain(recorder: TelemetryRecorder, now_s: float = 10.25) -> StepWindow:
    return recorder.drain(EngineStats(), now_s)


def test_steps_by_phase(recorder: TelemetryRecorder) -> None:
    recorder.record_step(StepRecord(100, 0, Levels(prefill=1, decode=3), 0.2, routed_pairs=400, dimmed_pairs=40))
    recorder.record_step(StepRecord(50, 8, Levels(prefill=2, decode=4), 0.1, routed_pairs=200, dimmed_pairs=60))
    recorder.record_step(StepRecord(0, 8, Levels(prefill=2, decode=0), 0.05))
    window = drain(recorder)
    prefill, decode = window.phases[Phase.PREFILL], window.phases[Phase.DECODE]
    assert (prefill.num_steps, prefill.num_tokens, prefill.level_tokens, prefill.level_peak) == (2, 150, 200, 2)
    assert (decode.num_steps, decode.num_tokens, decode.level_tokens, decode.level_peak) == (2, 16, 32, 4)
    assert decode.step_time_s.total == pytest.approx(0.15)
    assert (window.routed_pairs, window.dimmed_pairs) == (600, 100)


def test_requests_by_class_against_the_promise(recorder: TelemetryRecorder) -> None:
    recorder.record_first_token(ServiceClass.STANDARD, ttft_s=0.9, queue_wait_s=0.5)
    recorder.record_first_token(ServiceClass.STANDARD, ttft_s=1.1, queue_wait_s=0.0)
    recorder.record_first_token(ServiceClass.FULL, ttft_s=1.0, queue_wait_s=0.1)
    recorder.record_finish(ServiceClass.STANDARD, tpot_s=0.1)
    recorder.record_finish(ServiceClass.STANDARD, tpot_s=0.2)
    recorder.record_finish(ServiceClass.STANDARD, tpot_s=None)
    recorder.record_finish(ServiceClass.STANDARD, tpot_s=0.05, failed=True)
    window = drain(recorder)
    standard, full = window.classes[ServiceClass.STANDARD], window.classes[ServiceClass.FULL]
    assert (standard.num_finished, standard.num_failed) == (3, 1)
    assert (standard.num_ttft_ok, standard.num_tpot_ok) == (1, 2)
    assert (standard.ttft_s.num_values, standard.queue_wait_s.zero_count, standard.tpot_s.num_values) == (2, 1, 2)
    assert (full.num_ttft_ok, full.num_finished) == (1, 0)


def test_windows_are_disjoint_and_numbered(recorder: TelemetryRecorder) -> None:
    recorder.record_step(StepRecord(0, 1, Levels(), 0.1))
    recorder.record_preemption(2)
    first = drain(recorder, 10.25)
    second = drain(recorder, 10.75)
    assert (first.sequence, second.sequence) == (1, 2)
    assert (first.window_s, second.window_s) == (0.25, 0.5)
    assert (first.num_preemptions, second.num_preemptions) == (2, 0)
    assert second.phases == {} and second.classes == {}


def test_drain_carries_what_the_engine_says(recorder: TelemetryRecorder) -> None:
    stats = EngineStats(num_running=3, setting_version=9)
    window = recorder.drain(stats, 11.0, applied_epoch=2, trim=1.2, predicted_step_time_s=(0.2, 0.1))
    assert window.stats is stats
    assert (window.applied_epoch, window.trim, window.predicted_step_time_s) == (2, 1.2, (0.2, 0.1))


def test_totals_outlive_windows(recorder: TelemetryRecorder) -> None:
    for _ in range(2):
        recorder.record_step(StepRecord(4, 2, Levels(), 0.1, routed_pairs=12, dimmed_pairs=3))
        recorder.record_first_token(ServiceClass.FULL, 0.5, 0.1)
        recorder.record_finish(ServiceClass.FULL, 0.01)
        recorder.record_preemption()
        drain(recorder)
    totals = recorder.totals()
    assert (totals.num_steps, totals.prefill_tokens, totals.decode_tokens) == (2, 8, 4)
    assert (totals.routed_pairs, totals.dimmed_pairs, totals.num_preemptions) == (24, 6, 2)
    assert (totals.num_first_tokens, totals.num_finished, totals.num_ttft_ok, totals.num_tpot_ok) == (2, 2, 2, 2)
    recorder.record_preemption()
    assert totals.num_preemptions == 2, "a snapshot does not change"


def test_no_sample_is_lost_between_threads(recorder: TelemetryRecorder) -> None:
    num_steps, windows = 20_000, []
    engine = threading.Thread(
        target=lambda: [recorder.record_step(StepRecord(0, 1, Levels(), 0.01)) for _ in range(num_steps)]
    )
    engine.start()
    while engine.is_alive():
        windows.append(drain(recorder))
    engine.join()
    windows.append(drain(recorder))
    assert sum(w.phases[Phase.DECODE].num_steps for w in windows if w.phases) == num_steps
    assert [w.sequence for w in windows] == list(range(1, len(windows) + 1))


@pytest.mark.parametrize("value", [1e-6, 0.0123, 1.0, 37.5])
def test_a_bucket_stands_for_its_values(value: float) -> None:
    sketch = QuantileSketch()
    sketch.add(value)
    (bucket,) = sketch.counts
    gamma = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
    assert 2 * gamma**bucket / (gamma + 1) == pytest.approx(value, rel=RELATIVE_ERROR * 1.0001)
    assert gamma ** (bucket - 1) < value <= gamma**bucket or math.isclose(value, gamma**bucket)


def test_zero_and_impossible_durations_count_as_zero() -> None:
    sketch = QuantileSketch()
    sketch.add(0.0)
    sketch.add(-1e-9)
    assert (sketch.zero_count, sketch.counts, sketch.total) == (2, {}, 0.0)


def test_quality_is_spent_by_class(recorder: TelemetryRecorder) -> None:
    for _ in range(2):
        spent = {ServiceClass.STANDARD: (8, 0.4), ServiceClass.FULL: (2, 0.0)}
        recorder.record_step(StepRecord(0, 10, Levels(decode=1), 0.1, spent=spent))
    classes = drain(recorder).classes
    assert (classes[ServiceClass.STANDARD].num_tokens, classes[ServiceClass.STANDARD].loss_nats) == (16, 0.8)
    assert (classes[ServiceClass.FULL].num_tokens, classes[ServiceClass.FULL].loss_nats) == (4, 0.0)
    assert recorder.totals().loss_nats == 0.8


@pytest.mark.parametrize(("num_tokens", "log2"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (512, 9), (513, 10)])
def test_shapes_are_powers_of_two(recorder: TelemetryRecorder, num_tokens: int, log2: int) -> None:
    recorder.record_step(StepRecord(0, num_tokens, Levels(), 0.1))
    shapes = drain(recorder).phases[Phase.DECODE].shapes
    assert list(shapes) == [log2] and shapes[log2].num_steps == 1 and shapes[log2].step_time_s == 0.1


def test_a_mixed_step_has_one_shape_in_both_phases(recorder: TelemetryRecorder) -> None:
    recorder.record_step(StepRecord(100, 28, Levels(), 0.1))
    phases = drain(recorder).phases
    assert list(phases[Phase.PREFILL].shapes) == list(phases[Phase.DECODE].shapes) == [7]


def test_the_models_error_is_measured_over_predicted(recorder: TelemetryRecorder) -> None:
    recorder.record_step(StepRecord(0, 1, Levels(), 0.3, predicted_s=0.2))
    recorder.record_step(StepRecord(0, 1, Levels(), 0.1))
    window, totals = drain(recorder), recorder.totals()
    assert window.measured_per_predicted.num_values == 1
    assert window.measured_per_predicted.total == pytest.approx(1.5)
    assert (totals.predicted_steps, totals.prediction_error_s) == (1, pytest.approx(0.1))


def test_experts_are_reported_once(recorder: TelemetryRecorder) -> None:
    experts = ExpertLoad((3,), (8.0,), (0.5,), 1, (2,), (0.4,))
    recorder.record_experts(experts)
    assert drain(recorder).experts == experts
    assert drain(recorder, 10.5).experts is None
