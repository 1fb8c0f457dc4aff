"""What a request that arrived now could expect, at level 0 and dimmed: the arbiter's view of one model. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from controller.arbiter import ArbiterObservation
from controller.reports import Hello, StepWindow
from controller.types import Decision, Observation, Slo

PRIOR_OUTPUT_TOKENS = 64.0  # of an answer, before any has been seen


def observe_promise(
    hellos: Mapping[str, Hello],
    fresh: Sequence[StepWindow],
    observation: Observation,
    decision: Decision,
    slo: Slo,
    num_desired: int | None = None,
    max_replicas: int | None = None,
) -> ArbiterObservation:
    """``fresh``: the newest believable window of each replica; the router would choose the one with the least wait.

    A request waits for the prompts before it, or for the places that those before it take: max_num_seqs of them become
    free per mean answer. Without a planner, ``num_desired`` and ``max_replicas`` are what there is.
    """
    num_replicas = max(len(hellos), 1)
    mean_output = observation.decode.num_tokens / observation.num_finished if observation.num_finished else None
    waits = [
        (steps * window.predicted_step_time_s[0], steps * window.predicted_step_time_s[_deepest(window, decision)])
        for window in fresh
        if window.predicted_step_time_s
        for steps in [_steps_ahead(window, hellos[window.replica_id], mean_output or PRIOR_OUTPUT_TOKENS)]
    ]
    level0_s, dimmed_s = min(waits, default=(None, None), key=lambda pair: pair[1])
    desired = num_replicas if num_desired is None else num_desired
    return ArbiterObservation(
        ttft_slo_s=slo.ttft_s,
        ttft_level0_s=level0_s,
        ttft_dimmed_s=dimmed_s,
        drain_s=max((dimmed for _, dimmed in waits), default=0.0),
        num_replicas=num_replicas,
        num_starting=max(desired - num_replicas, 0),
        num_desired=desired,
        max_replicas=num_replicas if max_replicas is None else max_replicas,
    )


def _steps_ahead(window: StepWindow, hello: Hello, mean_output_tokens: float) -> float:
    prompts = window.queued_prefill_tokens / max(hello.max_num_batched_tokens, 1)
    places = window.num_waiting * mean_output_tokens / max(hello.max_num_seqs, 1)
    return 1 + max(prompts, places)


def _deepest(window: StepWindow, decision: Decision) -> int:
    allowed = max(decision.prefill.ceiling, decision.decode.ceiling)
    return min(allowed, len(window.predicted_step_time_s) - 1)
