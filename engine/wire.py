"""Protobuf <-> the engine's types, for the control stream."""

from __future__ import annotations

from engine.sketch import RELATIVE_ERROR, QuantileSketch
from engine.telemetry import ClassWindow, ExpertLoad, PhaseWindow, StepWindow
from engine.types import BrownoutSetting, Phase, PhaseSetting
from protos import control_pb2, telemetry_pb2

_PHASES = {telemetry_pb2.PREFILL: Phase.PREFILL, telemetry_pb2.DECODE: Phase.DECODE}
_PHASE_NUMBERS = {phase: number for number, phase in _PHASES.items()}


def setting_from_proto(message: control_pb2.BrownoutSetting) -> BrownoutSetting:
    """ValueError if a phase is missing or a value cannot work."""
    phases = {_PHASES.get(phase.phase): phase for phase in message.phases}
    if Phase.PREFILL not in phases or Phase.DECODE not in phases:
        raise ValueError("a setting must name both phases")
    if not message.lease_s > 0:
        raise ValueError(f"lease_s {message.lease_s} must be positive")
    return BrownoutSetting(
        prefill=_phase_setting(phases[Phase.PREFILL]),
        decode=_phase_setting(phases[Phase.DECODE]),
        epoch=message.epoch,
        version=message.version,
        lease_s=message.lease_s,
        law=message.law,
        reason=message.reason,
    )


def setting_to_proto(setting: BrownoutSetting, model_id: str) -> control_pb2.BrownoutSetting:
    """The inverse of `setting_from_proto`."""
    return control_pb2.BrownoutSetting(
        epoch=setting.epoch,
        version=setting.version,
        lease_s=setting.lease_s,
        model_id=model_id,
        law=setting.law,
        reason=setting.reason,
        phases=[
            control_pb2.PhaseSetting(
                phase=_PHASE_NUMBERS[phase],
                floor=part.floor,
                ceiling=part.ceiling,
                budget_s=part.budget_s,
                margin=part.margin,
            )
            for phase, part in ((Phase.PREFILL, setting.prefill), (Phase.DECODE, setting.decode))
        ],
    )


def _phase_setting(message: control_pb2.PhaseSetting) -> PhaseSetting:
    return PhaseSetting(floor=message.floor, ceiling=message.ceiling, budget_s=message.budget_s, margin=message.margin)


def window_to_proto(window: StepWindow) -> telemetry_pb2.StepWindow:
    """The message without its sender's identity."""
    stats = window.stats
    return telemetry_pb2.StepWindow(
        sequence=window.sequence,
        window_s=window.window_s,
        phases=[_phase_to_proto(phase, part) for phase, part in window.phases.items()],
        classes=[_class_to_proto(service_class, part) for service_class, part in window.classes.items()],
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        queued_prefill_tokens=stats.queued_prefill_tokens,
        oldest_wait_s=stats.oldest_wait_s,
        kv_used_frac=stats.kv_used_frac,
        level_prefill=stats.levels.prefill,
        level_decode=stats.levels.decode,
        routed_pairs=window.routed_pairs,
        dimmed_pairs=window.dimmed_pairs,
        num_preemptions=window.num_preemptions,
        applied_epoch=window.applied_epoch,
        applied_version=stats.setting_version,
        lease_expired=stats.lease_expired,
        trim=window.trim,
        predicted_step_time_s=window.predicted_step_time_s,
        measured_per_predicted=_sketch_to_proto(window.measured_per_predicted),
        experts=_experts_to_proto(window.experts),
    )


def _phase_to_proto(phase: Phase, part: PhaseWindow) -> telemetry_pb2.PhaseWindow:
    return telemetry_pb2.PhaseWindow(
        phase=_PHASE_NUMBERS[phase],
        num_steps=part.num_steps,
        num_tokens=part.num_tokens,
        level_tokens=part.level_tokens,
        level_peak=part.level_peak,
        step_time_s=_sketch_to_proto(part.step_time_s),
        shapes=[
            telemetry_pb2.ShapeWindow(log2_tokens=log2, num_steps=shape.num_steps, step_time_s=shape.step_time_s)
            for log2, shape in part.shapes.items()
        ],
    )


def _class_to_proto(service_class: str, part: ClassWindow) -> telemetry_pb2.ClassWindow:
    return telemetry_pb2.ClassWindow(
        service_class=service_class,
        num_finished=part.num_finished,
        num_failed=part.num_failed,
        num_ttft_ok=part.num_ttft_ok,
        num_tpot_ok=part.num_tpot_ok,
        queue_wait_s=_sketch_to_proto(part.queue_wait_s),
        ttft_s=_sketch_to_proto(part.ttft_s),
        tpot_s=_sketch_to_proto(part.tpot_s),
        num_tokens=part.num_tokens,
        loss_nats=part.loss_nats,
    )


def _experts_to_proto(experts: ExpertLoad | None) -> telemetry_pb2.ExpertLoad | None:
    if experts is None:
        return None
    return telemetry_pb2.ExpertLoad(
        layer=experts.layer,
        active_experts=experts.active_experts,
        balance_index=experts.balance_index,
        num_hot=experts.num_hot,
        hot_expert=experts.hot_expert,
        hot_share=experts.hot_share,
    )


def _sketch_to_proto(sketch: QuantileSketch) -> telemetry_pb2.QuantileSketch:
    buckets = sorted(sketch.counts)
    return telemetry_pb2.QuantileSketch(
        relative_error=RELATIVE_ERROR,
        bucket=buckets,
        count=[sketch.counts[bucket] for bucket in buckets],
        zero_count=sketch.zero_count,
        sum=sketch.total,
    )
