"""The wire: what is sound comes through unchanged, what cannot be true is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.reports import ExpertLoad, Hello, ShapeWindow
from controller.types import Decision, Phase, PhaseDecision, Reason, Setting
from controller.wire import MAX_CLASSES, read_hello, read_window, write_setting
from controller.wire_parts import WireError
from protos import control_pb2, telemetry_pb2

HELLO = Hello("replica", "model", 7, 4, True, level_loss=(0.0, 0.1, 0.2, 0.3))


def sound_hello() -> control_pb2.Hello:
    return control_pb2.Hello(
        replica_id="replica",
        model_id="model",
        incarnation=7,
        num_levels=4,
        ladder_measured=True,
        level_loss=[0.0, 0.1, 0.2, 0.3],
        full_step_time_s=[0.4, 0.3, 0.2, 0.1],
        applied=control_pb2.BrownoutSetting(
            epoch=2,
            version=9,
            lease_s=2.0,
            model_id="model",
            law="aimd",
            reason="from_the_future",
            phases=[
                control_pb2.PhaseSetting(phase=phase, floor=1, ceiling=3, budget_s=0.1, margin=0.9)
                for phase in (telemetry_pb2.PREFILL, telemetry_pb2.DECODE)
            ],
        ),
    )


def sound_window() -> telemetry_pb2.StepWindow:
    sketch = telemetry_pb2.QuantileSketch(relative_error=0.01, bucket=[-100, 3], count=[2, 1], sum=0.5)
    return telemetry_pb2.StepWindow(
        replica_id="replica",
        model_id="model",
        incarnation=7,
        sequence=1,
        window_s=0.25,
        phases=[
            telemetry_pb2.PhaseWindow(
                phase=telemetry_pb2.DECODE,
                num_steps=3,
                num_tokens=10,
                level_tokens=20,
                level_peak=3,
                step_time_s=sketch,
                shapes=[telemetry_pb2.ShapeWindow(log2_tokens=4, num_steps=3, step_time_s=0.5)],
            )
        ],
        classes=[
            telemetry_pb2.ClassWindow(
                service_class="standard", num_finished=3, ttft_s=sketch, num_tokens=10, loss_nats=2.9
            )
        ],
        measured_per_predicted=sketch,
        experts=telemetry_pb2.ExpertLoad(
            layer=[2], active_experts=[7.5], balance_index=[0.5], num_hot=2, hot_expert=[5, 1], hot_share=[0.5, 0.25]
        ),
        kv_used_frac=0.5,
        level_decode=3,
        routed_pairs=10,
        dimmed_pairs=4,
        trim=1.1,
        predicted_step_time_s=[0.4, 0.3, 0.2, 0.1],
    )


def test_sound_messages_come_through() -> None:
    assert read_hello(sound_hello()).level_loss == (0.0, 0.1, 0.2, 0.3)
    window = read_window(sound_window(), HELLO)
    decode = window.phases[Phase.DECODE]
    assert (decode.num_steps, decode.num_tokens, decode.level_tokens, decode.level_peak) == (3, 10, 20, 3)
    assert decode.step_time_s.counts == {-100: 2, 3: 1}
    assert window.classes["standard"].tpot_s.num_values == 0
    assert decode.shapes == {4: ShapeWindow(3, 0.5)}
    assert (window.classes["standard"].num_tokens, window.classes["standard"].loss_nats) == (10, 2.9)
    assert window.measured_per_predicted.num_values == 3
    assert window.experts == ExpertLoad((2,), (7.5,), (0.5,), 2, (5, 1), (0.5, 0.25))
    assert (window.trim, window.predicted_step_time_s[0]) == (1.1, 0.4)


BAD_HELLOS: dict[str, Callable[[control_pb2.Hello], object]] = {
    "replica_id": lambda m: setattr(m, "replica_id", ""),
    "model_id": lambda m: setattr(m, "model_id", "x" * 300),
    "num_levels": lambda m: setattr(m, "num_levels", 0),
    "level_loss": lambda m: m.level_loss.append(0.4),
    "full_step_time_s": lambda m: m.full_step_time_s.pop(),
    "start_s": lambda m: setattr(m, "start_s", math.nan),
    "applied.phases": lambda m: m.applied.phases.pop(),
    "applied.ceiling": lambda m: setattr(m.applied.phases[0], "floor", 4),
    "applied.margin": lambda m: setattr(m.applied.phases[1], "margin", math.nan),
}


@pytest.mark.parametrize("name", BAD_HELLOS)
def test_bad_hellos(name: str) -> None:
    message = sound_hello()
    BAD_HELLOS[name](message)
    with pytest.raises(WireError, match=name):
        read_hello(message)


Window = telemetry_pb2.StepWindow
BAD_WINDOWS: dict[str, Callable[[Window], object]] = {
    "replica_id": lambda m: setattr(m, "replica_id", "other"),
    "model_id": lambda m: setattr(m, "model_id", "other"),
    "sequence": lambda m: setattr(m, "sequence", 0),
    "window_s nan": lambda m: setattr(m, "window_s", math.nan),
    "window_s -1": lambda m: setattr(m, "window_s", -1.0),
    "oldest_wait_s inf": lambda m: setattr(m, "oldest_wait_s", math.inf),
    "kv_used_frac nan": lambda m: setattr(m, "kv_used_frac", math.nan),
    "kv_used_frac 1.5": lambda m: setattr(m, "kv_used_frac", 1.5),
    "level": lambda m: setattr(m, "level_decode", 4),
    "dimmed_pairs": lambda m: setattr(m, "dimmed_pairs", 11),
    "trim": lambda m: setattr(m, "trim", -0.1),
    "predicted_step_time_s": lambda m: m.predicted_step_time_s.pop(),
    "phase twice": lambda m: m.phases.append(m.phases[0]),
    "phase unknown": lambda m: setattr(m.phases[0], "phase", 0),
    "level_peak": lambda m: setattr(m.phases[0], "level_peak", 4),
    "level_tokens": lambda m: setattr(m.phases[0], "level_tokens", 31),
    "num_steps": lambda m: setattr(m.phases[0], "num_steps", 2),
    "relative_error": lambda m: setattr(m.phases[0].step_time_s, "relative_error", 0.5),
    "count": lambda m: m.phases[0].step_time_s.count.append(1),
    "bucket": lambda m: m.phases[0].step_time_s.bucket.reverse(),
    "bucket range": lambda m: m.phases[0].step_time_s.bucket.__setitem__(1, 2**30),
    "sum": lambda m: setattr(m.phases[0].step_time_s, "sum", math.nan),
    "service_class": lambda m: setattr(m.classes[0], "service_class", ""),
    "service_class twice": lambda m: m.classes.append(m.classes[0]),
    "loss_nats more than the worst level's": lambda m: setattr(m.classes[0], "loss_nats", 3.1),
    "log2_tokens": lambda m: setattr(m.phases[0].shapes[0], "log2_tokens", 99),
    "shapes.step_time_s": lambda m: setattr(m.phases[0].shapes[0], "step_time_s", math.inf),
    "measured_per_predicted": lambda m: setattr(m.measured_per_predicted, "relative_error", 0.5),
    "hot_share": lambda m: m.experts.hot_share.pop(),
    "balance": lambda m: m.experts.balance_index.__setitem__(0, 1.5),
    "active_experts": lambda m: m.experts.active_experts.append(math.nan),
    "incarnation": lambda m: setattr(m, "incarnation", 8),
    "classes": lambda m: m.classes.extend([m.classes[0]] * MAX_CLASSES),
}


@pytest.mark.parametrize("name", BAD_WINDOWS)
def test_bad_windows(name: str) -> None:
    message = sound_window()
    BAD_WINDOWS[name](message)
    with pytest.raises(WireError, match=name.split()[0]):
        read_window(message, HELLO)


@given(st.binary(max_size=200))
def test_any_parsable_window_is_read_or_refused(raw: bytes) -> None:
    message = sound_window()
    try:
        message.MergeFromString(raw)
        read_window(message, HELLO)
    except Exception as error:
        assert isinstance(error, WireError) or type(error).__name__ == "DecodeError"


def test_the_setting_that_a_replica_follows_comes_through() -> None:
    applied = read_hello(sound_hello()).applied
    phase = PhaseDecision(1, 3, 0.1, 0.9)
    assert applied == Setting(Decision(phase, phase, "aimd", Reason.RESTORED), "model", 2, 9, 2.0)


def test_a_setting_is_written_whole() -> None:
    prefill, decode = PhaseDecision(0, 3, 1.0, 0.8), PhaseDecision(1, 2, 0.1, 0.92)
    setting = Setting(Decision(prefill, decode, "aimd", Reason.HEADROOM), "model", 4, 9, 2.0)
    message = write_setting(setting).setting
    assert (message.epoch, message.version, message.lease_s, message.model_id) == (4, 9, 2.0, "model")
    assert (message.law, message.reason) == ("aimd", "headroom")
    assert [(p.phase, p.floor, p.ceiling, p.budget_s, p.margin) for p in message.phases] == [
        (telemetry_pb2.PREFILL, 0, 3, 1.0, 0.8),
        (telemetry_pb2.DECODE, 1, 2, 0.1, 0.92),
    ]
