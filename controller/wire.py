"""Protobuf <-> the controller's types. Everything that comes from outside is checked here, and only here.

A message that makes no sense raises WireError; its sender is told by nothing but a counter, and its stream goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from controller.reports import ClassWindow, Hello, LayerLoad, PhaseWindow, ShapeWindow, StepWindow
from controller.sketch import RELATIVE_ERROR, QuantileSketch
from controller.types import Decision, Phase, PhaseDecision, Reason, Setting
from protos import control_pb2, telemetry_pb2

MAX_ID_LENGTH = 256
MAX_LEVELS = 256
MAX_CLASSES = 16
MAX_LAYERS = 1024
MAX_HOT = 64
MAX_LOG2_TOKENS = 40
MAX_BUCKETS = 4096  # at 1 % resolution they span 35 decimal orders

_PHASES = {telemetry_pb2.PREFILL: Phase.PREFILL, telemetry_pb2.DECODE: Phase.DECODE}
_PHASE_NUMBERS = {phase: number for number, phase in _PHASES.items()}


class WireError(ValueError):
    """A message that cannot be true, in one sentence."""


def read_hello(message: control_pb2.Hello) -> Hello:
    _require(0 < message.num_levels <= MAX_LEVELS, "num_levels", message.num_levels)
    for name in ("level_loss", "full_step_time_s"):
        length = len(getattr(message, name))
        _require(length in (0, message.num_levels), f"len({name})", length)
    return Hello(
        replica_id=_id("replica_id", message.replica_id),
        model_id=_id("model_id", message.model_id),
        incarnation=message.incarnation,
        num_levels=message.num_levels,
        ladder_measured=message.ladder_measured,
        applied_epoch=message.applied_epoch,
        applied_version=message.applied_version,
        level_loss=tuple(_finite("level_loss", loss) for loss in message.level_loss),
        applied=_read_setting(message.applied) if message.HasField("applied") else None,
        start_s=_duration("start_s", message.start_s),
        max_num_seqs=message.max_num_seqs,
        max_num_batched_tokens=message.max_num_batched_tokens,
        full_step_time_s=tuple(_duration("full_step_time_s", time_s) for time_s in message.full_step_time_s),
    )


def read_window(message: telemetry_pb2.StepWindow, hello: Hello) -> StepWindow:
    """The window of the replica that said ``hello``; WireError if it is another's or cannot be true."""
    for name in ("replica_id", "model_id", "incarnation"):
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
        classes=_read_classes(message.classes, hello),
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
        measured_per_predicted=_read_sketch("measured_per_predicted", message.measured_per_predicted),
        layers=_read_layers(message.layers),
    )


def _read_setting(message: control_pb2.BrownoutSetting) -> Setting:
    """A setting that some controller sent to the replica."""
    phases = {_PHASES.get(phase.phase): phase for phase in message.phases}
    _require(set(phases) == {Phase.PREFILL, Phase.DECODE}, "applied.phases", len(message.phases))
    known = message.reason in tuple(Reason)
    decision = Decision(
        prefill=_read_phase_decision(phases[Phase.PREFILL]),
        decode=_read_phase_decision(phases[Phase.DECODE]),
        law=message.law,
        reason=Reason(message.reason) if known else Reason.RESTORED,
    )
    lease_s = _duration("applied.lease_s", message.lease_s)
    return Setting(decision, _id("applied.model_id", message.model_id), message.epoch, message.version, lease_s)


def _read_phase_decision(message: control_pb2.PhaseSetting) -> PhaseDecision:
    _require(message.floor <= message.ceiling < MAX_LEVELS, "applied.ceiling", message.ceiling)
    budget_s, margin = _duration("applied.budget_s", message.budget_s), _duration("applied.margin", message.margin)
    return PhaseDecision(message.floor, message.ceiling, budget_s, margin)


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
            shapes=_read_shapes(message.shapes),
        )
    return phases


def _read_shapes(messages: Iterable[telemetry_pb2.ShapeWindow]) -> dict[int, ShapeWindow]:
    shapes: dict[int, ShapeWindow] = {}
    for message in messages:
        _require(message.log2_tokens <= MAX_LOG2_TOKENS, "log2_tokens", message.log2_tokens)
        time_s = _duration("shapes.step_time_s", message.step_time_s)
        shapes[message.log2_tokens] = ShapeWindow(message.num_steps, time_s)
    return shapes


def _read_layers(messages: Sequence[telemetry_pb2.LayerLoad]) -> tuple[LayerLoad, ...]:
    _require(len(messages) <= MAX_LAYERS, "len(layers)", len(messages))
    layers = []
    for message in messages:
        _require(len(message.hot_expert) == len(message.hot_share) <= MAX_HOT, "len(hot_share)", len(message.hot_share))
        hot = tuple(zip(message.hot_expert, map(_fraction, message.hot_share), strict=True))
        active = _duration("active_experts", message.active_experts)
        layers.append(LayerLoad(message.layer, active, _fraction(message.balance_index), hot))
    return tuple(layers)


def _read_classes(messages: Iterable[telemetry_pb2.ClassWindow], hello: Hello) -> dict[str, ClassWindow]:
    worst = max(hello.level_loss, default=0.0)
    classes: dict[str, ClassWindow] = {}
    for message in messages:
        service_class = _id("service_class", message.service_class)
        _require(service_class not in classes, "service_class", service_class)
        loss_nats = _duration("loss_nats", message.loss_nats)
        _require(loss_nats <= message.num_tokens * worst * (1 + 1e-9), "loss_nats", loss_nats)
        classes[service_class] = ClassWindow(
            num_finished=message.num_finished,
            num_failed=message.num_failed,
            num_ttft_ok=message.num_ttft_ok,
            num_tpot_ok=message.num_tpot_ok,
            queue_wait_s=_read_sketch("queue_wait_s", message.queue_wait_s),
            ttft_s=_read_sketch("ttft_s", message.ttft_s),
            tpot_s=_read_sketch("tpot_s", message.tpot_s),
            num_tokens=message.num_tokens,
            loss_nats=loss_nats,
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


def _fraction(value: float) -> float:
    _require(0 <= value <= 1 + 1e-9, "fraction", value)
    return value


def _finite(name: str, value: float) -> float:
    _require(math.isfinite(value), name, value)
    return value


def _require(holds: bool, name: str, value: object) -> None:
    if not holds:
        raise WireError(f"{name} {value!r} cannot be true")
