"""The governor: picks each step's brownout level from the setting in force and predicted times. Pure.

Feed-forward: it does not wait for a percentile to go bad. Each step it keeps, for every level, a moving average
m[level] of the step time predicted for the recent batch shapes, and takes the least level at which

    m[level] <= margin * TPOT budget                                           (each running request keeps its pace)
    waited(k) + steps(k) * m[level] <= margin * TTFT budget   for sampled k    (each waiting request starts in time)

where steps(k) counts the steps until the k-th waiting request has its first token: its prompt and those before it in
chunks of the token budget, and, when the batch is full, the steps until k places have become free (Little's law:
places free up at max_num_seqs / mean output length per step). On the way down it also asks whether the lower level
carries what arrives, or a queue would only build up again:

    m[level] <= max_num_seqs / (arrival rate * mean output length)             (a full batch keeps up with the arrivals)

| setting                    | prediction                                 | level                                     |
| -------------------------- | ------------------------------------------ | ----------------------------------------- |
| floor == ceiling           | any                                        | floor, at once                            |
| floor < ceiling            | a lower level would break a budget         | least level that keeps both, at once      |
| floor < ceiling            | a lower level has been enough for DOWN_S   | one level down, at most one per DOWN_S    |
| floor < ceiling            | ... but does not carry the arrivals        | kept                                      |
| floor < ceiling            | no level keeps the budgets                 | ceiling                                   |
| floor < ceiling            | no request was here for a while            | one level down for each DOWN_S of it      |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.step_time import StepTimeModel
from engine.types import BrownoutSetting, Levels, PhaseSetting

SMOOTHING_S = 0.4  # time constant of m[level]
DOWN_S = 0.5  # a level must have been more than enough for so long before it is left
ARRIVALS_S = 3.0  # time constant of the arrival rate
MAX_QUEUE_SAMPLES = 16
OUTPUT_LENGTH_GAIN = 0.05


@dataclass(frozen=True, slots=True)
class Waiting:
    """The ``position``-th request of the queue (from 1; 0: it is in the batch, its prompt not yet computed), with
    all prompt tokens up to and including its own."""

    position: int
    waited_s: float
    prefill_tokens: int


@dataclass(frozen=True, slots=True)
class StepObservation:
    """What the governor sees before a step."""

    num_tokens: int  # of the step to come
    idle_s: float = 0.0  # since the last step ended
    waiting: Sequence[Waiting] = ()  # requests without a first token: those in the batch, and a sample of the queue
    num_free_slots: int = 0
    max_num_seqs: int = 1
    prefill_tokens_per_step: int = 1  # token budget left beside the decoding rows


@dataclass(frozen=True, slots=True)
class GovernorState:
    model: StepTimeModel
    smoothed_s: tuple[float, ...]  # m[level]
    level: int = 0
    enough_since_s: float = math.inf  # since when a lower level would have been enough; inf: it would not
    updated_s: float = -math.inf
    mean_output_tokens: float = 64.0
    arrivals_per_s: float = 0.0  # as of arrived_s; decays from then on
    arrived_s: float = 0.0

    @staticmethod
    def initial(model: StepTimeModel) -> GovernorState:
        return GovernorState(model, tuple(model.predict_s(level, 1) for level in range(model.num_levels)))


def choose_levels(
    state: GovernorState, setting: BrownoutSetting, observation: StepObservation, now_s: float
) -> tuple[GovernorState, Levels]:
    """The next step's level, the same for both phases within each phase's floor and ceiling."""
    state = _smooth(state, observation.num_tokens, now_s)
    top = state.model.num_levels - 1
    wanted = max(
        _least_level(state.smoothed_s, setting.decode.margin * setting.decode.budget_s),
        _least_level(state.smoothed_s, _step_time_for_queue_s(setting.prefill, observation, state.mean_output_tokens)),
    )
    level, enough_since_s = max(0, state.level - int(observation.idle_s / DOWN_S)), state.enough_since_s
    if wanted >= level:
        level, enough_since_s = wanted, math.inf
    elif _level_for_arrivals(state, observation.max_num_seqs, now_s) >= level:
        enough_since_s = math.inf
    elif enough_since_s == math.inf:
        enough_since_s = now_s
    elif now_s - enough_since_s >= DOWN_S:
        level, enough_since_s = level - 1, now_s
    levels = Levels(prefill=_clamp(level, setting.prefill, top), decode=_clamp(level, setting.decode, top))
    # Remembering a level that neither phase may have would delay the way down once the range allows it again.
    level = min(max(level, min(levels.prefill, levels.decode)), levels.peak)
    return replace(state, level=level, enough_since_s=enough_since_s), levels


def observe_step(state: GovernorState, level: int, num_tokens: int, step_time_s: float) -> GovernorState:
    """Learn from a step that ran wholly at ``level``."""
    return replace(state, model=state.model.observe(level, num_tokens, step_time_s))


def observe_finish(state: GovernorState, num_output_tokens: int) -> GovernorState:
    """Learn how long answers are."""
    mean = state.mean_output_tokens
    return replace(state, mean_output_tokens=mean + OUTPUT_LENGTH_GAIN * (num_output_tokens - mean))


def observe_arrival(state: GovernorState, now_s: float) -> GovernorState:
    """Count a request that came at ``now_s``."""
    return replace(state, arrivals_per_s=_arrivals_per_s(state, now_s) + 1 / ARRIVALS_S, arrived_s=now_s)


def sample_positions(num_waiting: int) -> list[int]:
    """Which queue positions (from 0) to look at: all of a short queue, evenly spread over a long one, ends included."""
    if num_waiting <= MAX_QUEUE_SAMPLES:
        return list(range(num_waiting))
    last = num_waiting - 1
    return sorted({round(i * last / (MAX_QUEUE_SAMPLES - 1)) for i in range(MAX_QUEUE_SAMPLES)})


def _smooth(state: GovernorState, num_tokens: int, now_s: float) -> GovernorState:
    gain = 1.0 - math.exp(-(now_s - state.updated_s) / SMOOTHING_S)
    predicted = (state.model.predict_s(level, num_tokens) for level in range(state.model.num_levels))
    smoothed = tuple(m + gain * (p - m) for m, p in zip(state.smoothed_s, predicted, strict=True))
    return replace(state, smoothed_s=smoothed, updated_s=now_s)


def _least_level(smoothed_s: Sequence[float], step_time_s: float) -> int:
    """The least level whose step fits into step_time_s, else the strongest."""
    return next((level for level, m in enumerate(smoothed_s) if m <= step_time_s), len(smoothed_s) - 1)


def _step_time_for_queue_s(setting: PhaseSetting, observation: StepObservation, mean_output_tokens: float) -> float:
    """The longest step with which every sampled waiting request still gets its first token in time."""
    steps_per_place = mean_output_tokens / observation.max_num_seqs
    longest_s = math.inf
    for request in observation.waiting:
        prefill_steps = math.ceil(request.prefill_tokens / max(observation.prefill_tokens_per_step, 1))
        places_missing = max(0, request.position - observation.num_free_slots)
        steps = max(1.0, prefill_steps, places_missing * steps_per_place + 1)
        longest_s = min(longest_s, (setting.margin * setting.budget_s - request.waited_s) / steps)
    return longest_s


def _level_for_arrivals(state: GovernorState, max_num_seqs: int, now_s: float) -> int:
    """The least level at which a full batch finishes requests as fast as they arrive."""
    places_per_s = _arrivals_per_s(state, now_s) * state.mean_output_tokens
    full_s = [max(m, state.model.predict_s(level, max_num_seqs)) for level, m in enumerate(state.smoothed_s)]
    return _least_level(full_s, max_num_seqs / places_per_s if places_per_s else math.inf)


def _arrivals_per_s(state: GovernorState, now_s: float) -> float:
    return state.arrivals_per_s * math.exp(min(0.0, state.arrived_s - now_s) / ARRIVALS_S)


def _clamp(level: int, setting: PhaseSetting, top: int) -> int:
    return min(max(level, min(setting.floor, top)), min(setting.ceiling, top))
