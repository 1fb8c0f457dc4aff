"""What the planner sees of one model's fleet, from the replicas' newest reports. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from controller.planner import FleetObservation
from controller.reports import Hello, StepWindow


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
