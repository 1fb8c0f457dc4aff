"""What planner and arbiter see of one model's fleet, from the replicas' newest reports. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from controller.arbiter import ArbiterObservation
from controller.planner import FleetObservation
from controller.reports import Hello, StepWindow
from controller.types import Observation, Slo

USUAL_OUTPUT_TOKENS = 64.0  # until answers have been seen


def observe_fleet(
    hellos: Sequence[Hello], fresh: Sequence[StepWindow], desired: int | None, cold_start_s: float | None
) -> FleetObservation:
    """``fresh``: the newest window of each replica that can be believed; ``desired``: what the last plan asked for.

    Until a cold start has been seen from outside, what the replicas say of their own start stands for it.
    """
    predicted = [window for window in fresh if window.predicted_step_time_s]
    profiles = [hello.full_step_time_s[0] for hello in hellos if hello.full_step_time_s]
    return FleetObservation(
        num_ready=len(hellos),
        num_starting=max((desired or 0) - len(hellos), 0),
        num_running=sum(window.num_running for window in fresh),
        num_waiting=sum(window.num_waiting for window in fresh),
        queued_prefill_tokens=sum(window.queued_prefill_tokens for window in fresh),
        level_mean=fmean(window.level_decode for window in fresh) if fresh else 0.0,
        step_s=fmean(w.predicted_step_time_s[w.level_decode] for w in predicted) if predicted else None,
        step_level0_s=fmean(w.predicted_step_time_s[0] for w in predicted) if predicted else None,
        full_step_level0_s=fmean(profiles) if profiles else 0.0,
        max_num_seqs=max((hello.max_num_seqs for hello in hellos), default=0) or 1,
        max_num_batched_tokens=max((hello.max_num_batched_tokens for hello in hellos), default=0) or 1,
        cold_start_s=cold_start_s or max((hello.start_s for hello in hellos), default=0.0) or None,
    )


def observe_threat(
    fleet: FleetObservation,
    fresh: Sequence[StepWindow],
    seen: Observation,
    slo: Slo,
    ceiling: int,
    desired: int | None,
    max_replicas: int,
) -> ArbiterObservation:
    """Predicted TTFTs of a request that would arrive now, at level 0 and at the deepest level allowed.

    The mean replica computes the queued prompts in chunks of its token budget; while requests wait, its batch is full,
    and places come free at max_num_seqs / mean output length per step (Little's law).
    """
    num_ready = max(fleet.num_ready, 1)
    predicted = [window.predicted_step_time_s for window in fresh if window.predicted_step_time_s]
    dimmed_s = fmean(times_s[min(ceiling, len(times_s) - 1)] for times_s in predicted) if predicted else None
    answered = seen.decode.num_tokens / seen.num_finished if seen.num_finished else USUAL_OUTPUT_TOKENS
    prefill_steps = math.ceil(fleet.queued_prefill_tokens / num_ready / fleet.max_num_batched_tokens)
    queue_steps = fleet.num_waiting / num_ready * answered / fleet.max_num_seqs
    steps = max(prefill_steps, queue_steps) + 1
    return ArbiterObservation(
        ttft_slo_s=slo.ttft_s,
        ttft_level0_s=None if fleet.step_level0_s is None else steps * fleet.step_level0_s,
        ttft_dimmed_s=None if dimmed_s is None or ceiling == 0 else steps * dimmed_s,
        drain_s=queue_steps * (dimmed_s or 0.0),
        num_replicas=fleet.num_ready,
        num_starting=fleet.num_starting,
        num_desired=desired if desired is not None else fleet.num_ready,
        max_replicas=max_replicas,
    )
