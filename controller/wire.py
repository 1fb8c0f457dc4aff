"""Protobuf <-> the controller's types. All that comes from outside is checked here and in wire_parts.py, only there.

A message that makes no sense raises WireError; its sender is told by nothing but a counter, and its stream goes on.
"""

from __future__ import annotations

from collections.abc import Iterable

from controller.reports import ClassWindow, Hello, PhaseWindow, StepWindow
from controller.types import Decision, Phase, PhaseDecision, Reason, Setting
from controller.wire_parts import (
    WireError,
    duration,
    durations,
    finite,
    identifier,
    read_experts,
    read_shapes,
    read_sketch,
    require,
)
from protos import control_pb2, telemetry_pb2

MAX_LEVELS = 256
MAX_CLASSES = 16

_PHASES = {telemetry_pb2.PREFILL: Phase.PREFILL, telemetry_pb2.DECODE: Phase.DECODE}
_PHASE_NUMBERS = {phase: number for number, phase in _PHASES.items()}


def read_hello(message: control_pb2.Hello) -> Hello:
    require(0 < message.num_levels <= MAX_LEVELS, "num_levels", message.num_levels)
    for name in ("level_loss", "full_step_time_s"):
        length = len(getattr(message, name))
        require(length in (0, message.num_levels), f"len({name})", length)
    return Hello(
        replica_id=identifier("replica_id", message.replica_id),
        model_id=identifier("model_id", message.model_id),
        incarnation=message.incarnation,
        num_levels=message.num_levels,
        ladder_measured=message.ladder_measured,
        applied_epoch=message.applied_epoch,
        applied_version=message.applied_version,
        level_loss=tuple(finite("level_loss", loss) for loss in message.level_loss),
        applied=_read_setting(message.applied) if message.HasField("applied") else None,
        start_s=duration("start_s", message.start_s),
        max_num_seqs=message.max_num_seqs,
        max_num_batched_tokens=message.max_num_batched_tokens,
        full_step_time_s=durations("full_step_time_s", message.full_step_time_s),
    )


def read_window(message: telemetry_pb2.StepWindow, hello: Hello) -> StepWindow:
    """The window of the replica that said ``hello``; WireError if it is another's or cannot be true."""
    for name in ("replica_id", "model_id", "incarnation"):
        require(getattr(message, name) == getattr(hello, name), name, getattr(message, name))
    require(message.sequence > 0, "sequence", message.sequence)
    require(message.dimmed_pairs <= message.routed_pairs, "dimmed_pairs", message.dimmed_pairs)
    require(max(message.level_prefill, message.level_decode) < hello.num_levels, "level", message.level_decode)
    require(0 <= message.kv_used_frac <= 1, "kv_used_frac", message.kv_used_frac)
    require(len(message.classes) <= MAX_CLASSES, "len(classes)", len(message.classes))
    predicted_s = durations("predicted_step_time_s", message.predicted_step_time_s)
    require(len(predicted_s) in (0, hello.num_levels), "len(predicted_step_time_s)", len(predicted_s))
    return StepWindow(
        replica_id=message.replica_id,
        model_id=message.model_id,
        incarnation=message.incarnation,
        sequence=message.sequence,
        window_s=duration("window_s", message.window_s),
        phases=_read_phases(message.phases, hello.num_levels),
        classes=_read_classes(message.classes, hello),
        num_running=message.num_running,
        num_waiting=message.num_waiting,
        queued_prefill_tokens=message.queued_prefill_tokens,
        oldest_wait_s=duration("oldest_wait_s", message.oldest_wait_s),
        kv_used_frac=message.kv_used_frac,
        level_prefill=message.level_prefill,
        level_decode=message.level_decode,
        routed_pairs=message.routed_pairs,
        dimmed_pairs=message.dimmed_pairs,
        num_preemptions=message.num_preemptions,
        applied_epoch=message.applied_epoch,
        applied_version=message.applied_version,
        lease_expired=message.lease_expired,
        trim=duration("trim", message.trim),
        predicted_step_time_s=predicted_s,
        measured_per_predicted=read_sketch("measured_per_predicted", message.measured_per_predicted),
        experts=read_experts(message.experts) if message.HasField("experts") else None,
    )


def _read_setting(message: control_pb2.BrownoutSetting) -> Setting:
    """A setting that some controller sent to the replica."""
    phases = {_PHASES.get(phase.phase): phase for phase in message.phases}
    require(set(phases) == {Phase.PREFILL, Phase.DECODE}, "applied.phases", len(message.phases))
    known = message.reason in tuple(Reason)
    decision = Decision(
        prefill=_read_phase_decision(phases[Phase.PREFILL]),
        decode=_read_phase_decision(phases[Phase.DECODE]),
        law=message.law,
        reason=Reason(message.reason) if known else Reason.RESTORED,
    )
    lease_s = duration("applied.lease_s", message.lease_s)
    return Setting(decision, identifier("applied.model_id", message.model_id), message.epoch, message.version, lease_s)


def _read_phase_decision(message: control_pb2.PhaseSetting) -> PhaseDecision:
    require(message.floor <= message.ceiling < MAX_LEVELS, "applied.ceiling", message.ceiling)
    budget_s, margin = duration("applied.budget_s", message.budget_s), duration("applied.margin", message.margin)
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
        require(message.level_peak < num_levels, "level_peak", message.level_peak)
        most = message.num_tokens * message.level_peak
        require(message.level_tokens <= most, "level_tokens", message.level_tokens)
        step_time_s = read_sketch("step_time_s", message.step_time_s)
        require(step_time_s.num_values <= message.num_steps, "num_steps", message.num_steps)
        phases[phase] = PhaseWindow(
            num_steps=message.num_steps,
            num_tokens=message.num_tokens,
            level_tokens=message.level_tokens,
            level_peak=message.level_peak,
            step_time_s=step_time_s,
            shapes=read_shapes(message.shapes),
        )
    return phases


def _read_classes(messages: Iterable[telemetry_pb2.ClassWindow], hello: Hello) -> dict[str, ClassWindow]:
    worst = max(hello.level_loss, default=0.0)
    classes: dict[str, ClassWindow] = {}
    for message in messages:
        service_class = identifier("service_class", message.service_class)
        require(service_class not in classes, "service_class", service_class)
        loss_nats = duration("loss_nats", message.loss_nats)
        require(loss_nats <= message.num_tokens * worst * (1 + 1e-9), "loss_nats", loss_nats)
        classes[service_class] = ClassWindow(
            num_finished=message.num_finished,
            num_failed=message.num_failed,
            num_ttft_ok=message.num_ttft_ok,
            num_tpot_ok=message.num_tpot_ok,
            queue_wait_s=read_sketch("queue_wait_s", message.queue_wait_s),
            ttft_s=read_sketch("ttft_s", message.ttft_s),
            tpot_s=read_sketch("tpot_s", message.tpot_s),
            num_tokens=message.num_tokens,
            loss_nats=loss_nats,
        )
    return classes
