"""Protobuf <-> the controller's types. Everything that comes from outside is checked here, and only here.

A message that makes no sense raises WireError; its sender is told by nothing but a counter, and its stream goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

from controller.reports import ClassWindow, Hello, PhaseWindow, StepWindow
from controller.sketch import RELATIVE_ERROR, QuantileSketch
from controller.types import Phase, PhaseDecision, Setting
from protos import control_pb2, telemetry_pb2

MAX_ID_LENGTH = 256
MAX_LEVELS = 256
MAX_CLASSES = 16
MAX_BUCKETS = 4096  # at 1 % resolution they span 35 decimal orders

_PHASES = {telemetry_pb2.PREFILL: Phase.PREFILL, telemetry_pb2.DECODE: Phase.DECODE}
_PHASE_NUMBERS = {phase: number for number, phase in _PHASES.items()}


class WireError(ValueError):
    """A message that cannot be true, in one sentence."""


def read_hello(message: control_pb2.Hello) -> Hello:
    _require(0 < message.num_levels <= MAX_LEVELS, "num_levels", message.num_levels)
    _require(len(message.level_loss) in (0, message.num_levels), "len(level_loss)", len(message.level_loss))
    return Hello(
        replica_id=_id("replica_id", message.replica_id),
        model_id=_id("model_id", message.model_id),
        incarnation=message.incarnation,
        num_levels=message.num_levels,
        ladder_measured=message.ladder_measured,
        applied_epoch=message.applied_epoch,
        applied_version=message.applied_version,
        level_loss=tuple(_finite("level_loss", loss) for loss in message.level_loss),
    )


def read_window(message: telemetry_pb2.StepWindow, hello: Hello) -> StepWindow:
    """The window of the replica that said ``hello``; WireError if it is another's or cannot be true."""
    for name in ("replica_id", "model_id"):
        _require(getattr(message, name) == getattr(hello, name), name, getattr(message, name))
    _require(message.sequence > 0, "sequence", message.sequence)
    _require(message.dimmed_pairs <= message.routed_pairs, "dimmed_pairs", message.dimmed_pairs)
    _require(max(message.level_prefill, message.level_decode) < hello.num_levels, "level", message.level_decode)
    _require(0 <= message.kv_used_frac <= 1, "kv_used_frac", message.kv_used_frac)
    _require(len(message.classes) <= MAX_CLASSES, "len(classes)", len(message.classes))
    predicted_s = tuple(_duration("predicted_step_time_s", value) for value in message.predicted_step_time_s)
    _require(len(predicted_s) in (0, hello.num_levels), "len(predicted_step_time_s)", len(predicted_s))
    return StepWindow(
        replica_id=message.replica_id,
        model_id=message.model_id,
        incarnation=message.incarnation,
        sequence=message.sequence,
        window_s=_duration("window_s", message.window_s),
        phases=_read_phases(message.phases, hello.num_levels),
        classes=_read_classes(message.classes),
        num_running=message.num_running,
        num_waiting=message.num_waiting,
        queued_prefill_tokens=message.queued_prefill_tokens,
        oldest_wait_s=_duration("oldest_wait_s", message.oldest_wait_s),
        kv_used_frac=message.kv_used_frac,
        level_prefill=message.level_prefill,
        level_decode=message.level_decode,
        routed_pairs=message.routed_pairs,
        dimmed_pairs=message.dimmed_pairs,
        num_preemptions=message.num_preemptions,
        applied_epoch=message.applied_epoch,
        applied_version=message.applied_version,
        lease_expired=message.lease_expired,
        trim=_duration("trim", message.trim),
        predicted_step_time_s=predicted_s,
    )


def write_setting(setting: Setting) -> control_pb2.ControllerMessage:
    decision = setting.decision
    return control_pb2.ControllerMessage(
        setting=control_pb2.BrownoutSetting(
            epoch=setting.epoch,
            version=setting.version,
            lease_s=setting.lease_s,
            model_id=setting.model_id,
            law=decision.law,
            reason=decision.reason,
            phases=[_write_phase(Phase.PREFILL, decision.prefill), _write_phase(Phase.DECODE, decision.decode)],
        )
    )


def _write_phase(phase: Phase, decision: PhaseDecision) -> control_pb2.PhaseSetting:
    return control_pb2.PhaseSetting(
        phase=_PHASE_NUMBERS[phase],
        floor=decision.floor,
        ceiling=decision.ceiling,
        budget_s=decision.budget_s,
        margin=decision.margin,
    )


def _read_phases(messages: Iterable[telemetry_pb2.PhaseWindow], num_levels: int) -> dict[Phase, PhaseWindow]:
    phases: dict[Phase, PhaseWindow] = {}
    for message in messages:
        phase = _PHASES.get(message.phase)
        if phase is None or phase in phases:
            raise WireError(f"phase {message.phase} is unknown or there twice")
        _require(message.level_peak < num_levels, "level_peak", message.level_peak)
        most = message.num_tokens * message.level_peak
        _require(message.level_tokens <= most, "level_tokens", message.level_tokens)
        step_time_s = _read_sketch("step_time_s", message.step_time_s)
        _require(step_time_s.num_values <= message.num_steps, "num_steps", message.num_steps)
        phases[phase] = PhaseWindow(
            num_steps=message.num_steps,
            num_tokens=message.num_tokens,
            level_tokens=message.level_tokens,
            level_peak=message.level_peak,
            step_time_s=step_time_s,
        )
    return phases


def _read_classes(messages: Iterable[telemetry_pb2.ClassWindow]) -> dict[str, ClassWindow]:
    classes: dict[str, ClassWindow] = {}
    for message in messages:
        service_class = _id("service_class", message.service_class)
        _require(service_class not in classes, "service_class", service_class)
        classes[service_class] = ClassWindow(
            num_finished=message.num_finished,
            num_failed=message.num_failed,
            num_ttft_ok=message.num_ttft_ok,
            num_tpot_ok=message.num_tpot_ok,
            queue_wait_s=_read_sketch("queue_wait_s", message.queue_wait_s),
            ttft_s=_read_sketch("ttft_s", message.ttft_s),
            tpot_s=_read_sketch("tpot_s", message.tpot_s),
        )
    return classes


def _read_sketch(name: str, message: telemetry_pb2.QuantileSketch) -> QuantileSketch:
    buckets, counts = tuple(message.bucket), tuple(message.count)
    if not buckets and not counts and not message.zero_count:
        return QuantileSketch()  # an absent sketch has resolution 0 on the wire
    _require(message.relative_error == RELATIVE_ERROR, f"{name}.relative_error", message.relative_error)
    _require(len(buckets) == len(counts) <= MAX_BUCKETS, f"len({name}.count)", len(counts))
    _require(all(a < b for a, b in pairwise(buckets)), f"{name}.bucket", "not ascending")
    _require(all(abs(bucket) <= MAX_BUCKETS for bucket in buckets), f"{name}.bucket", "beyond the range")
    return QuantileSketch(
        relative_error=message.relative_error,
        counts=dict(zip(buckets, counts, strict=True)),
        zero_count=message.zero_count,
        total=_duration(f"{name}.sum", message.sum),
    )


def _id(name: str, value: str) -> str:
    _require(0 < len(value) <= MAX_ID_LENGTH and value.isprintable(), name, value[:MAX_ID_LENGTH])
    return value


def _duration(name: str, value: float) -> float:
    _require(value >= 0, name, value)
    return _finite(name, value)


def _finite(name: str, value: float) -> float:
    _require(math.isfinite(value), name, value)
    return value


def _require(holds: bool, name: str, value: object) -> None:
    if not holds:
        raise WireError(f"{name} {value!r} cannot be true")
