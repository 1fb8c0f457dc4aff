"""The governor: picks each step's brownout level from the setting in force and predicted times. Pure.

Feed-forward: it does not wait for a percentile to go bad. Each step it keeps, for every level, a moving average
m[level] of the step time predicted for the recent batch shapes, and takes the least level at which

    m[level] <= margin * TPOT budget                                           (each running request keeps its pace)
    waited(k) + chunks(k) * c[level] <= margin * TTFT budget  for sampled k    (each prompt is computed in time)
    waited(k) + places(k) * m[level] <= margin * TTFT budget  for sampled k    (each waiting request starts in time)
    f[level] <= max_num_seqs / (CARRIED_FRAC * arrival rate * mean output length)     (a full batch nearly keeps up)

where chunks(k) counts the steps of a whole token budget, c[level] each, until the k-th waiting request's prompt and
those before it are computed, and places(k) the steps until k places of a full batch have become free (Little's law:
max_num_seqs / mean output length per step). f[level] is the step of a full batch. The last condition raises the level
only when the batch is nearly full, before a queue has formed; on the way down it always counts, or a queue would only
build up again. What it leaves of the arrivals is for the queue to ask for: levels are few, and the one that carries
everything may lose far more than turns of the two beside the need; and the rate is known within a tenth only.

| setting                    | prediction                                 | level                                     |
| -------------------------- | ------------------------------------------ | ----------------------------------------- |
| floor == ceiling           | any                                        | floor, at once                            |
| floor < ceiling            | a lower level would break a budget         | least level that keeps both, at once      |
| floor < ceiling            | nearly full, lower would not carry arrivals| least level that does, at once            |
| floor < ceiling            | a lower level has been enough for DOWN_S   | the deepest that was needed meanwhile     |
| floor < ceiling            | ... but does not carry the arrivals        | kept                                      |
| floor < ceiling            | no level keeps the budgets                 | least level within USELESS_FRAC of best   |
| floor < ceiling            | prompts queue beyond `prompt_margin`       | least level that prevents it, while so    |
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
ARRIVALS_S = (1.0, 4.0)  # bounds of the arrival rate's time constant
NUM_ARRIVALS = 100.0  # that the rate remembers, within those bounds
CARRIED_FRAC = 0.85  # of the arrivals, that the level must carry without being asked by a queue
FORFEIT_FRAC = 0.1  # of what dimming could spare a queue of prompts, that may be lost by beginning late
FULL_FRAC = 0.9  # of the places: from here on the arrivals may raise the level
USELESS_FRAC = 0.01  # a deeper level that gains less than this is not worth its loss
MAX_QUEUE_SAMPLES = 16
OUTPUT_LENGTH_GAIN = 0.02


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
    num_exact: int = 0  # of these, tokens of requests that are never dimmed
    idle_s: float = 0.0  # since the last step ended
    waiting: Sequence[Waiting] = ()  # requests without a first token: those in the batch, and a sample of the queue
    num_free_slots: int = 0
    max_num_seqs: int = 1
    num_held: int = 0  # requests in the batch and in the queue
    prefill_tokens_per_step: int = 1  # token budget left beside the decoding rows
    max_num_batched_tokens: int = 1  # of a step


@dataclass(frozen=True, slots=True)
class GovernorState:
    model: StepTimeModel
    smoothed_s: tuple[float, ...]  # m[level]
    level: int = 0
    enough_since_s: float = math.inf  # since when a lower level would have been enough; inf: it would not
    enough_level: int = 0  # the deepest that was needed since then
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
    state = _smooth(state, observation, now_s)
    top = state.model.num_levels - 1
    carrying = _level_for_arrivals(state, observation, now_s)
    wanted = max(_level_for_pace(state, setting.decode), _level_for_queue(state, setting.prefill, observation))
    if observation.num_held >= FULL_FRAC * observation.max_num_seqs:
        wanted = max(wanted, carrying)
    level = max(0, state.level - int(observation.idle_s / DOWN_S))
    needed, enough_since_s, enough_level = max(wanted, carrying), state.enough_since_s, state.enough_level
    if wanted >= level:
        level, enough_since_s = wanted, math.inf
    elif needed >= level:
        enough_since_s = math.inf
    elif enough_since_s == math.inf:
        enough_since_s, enough_level = now_s, needed
    else:
        enough_level = max(enough_level, needed)
        if now_s - enough_since_s >= DOWN_S:
            level, enough_since_s, enough_level = enough_level, now_s, needed
    head_start = _head_start(state, setting.prefill, observation)
    levels = _within(setting, level, top)
    # Remembering a level that neither phase may have would delay the way down once the range allows it again.
    level = min(max(level, min(levels.prefill, levels.decode)), levels.peak)
    state = replace(state, level=level, enough_since_s=enough_since_s, enough_level=enough_level)
    return state, _within(setting, max(level, head_start), top)


def choose_budget(
    state: GovernorState, setting: BrownoutSetting, observation: StepObservation, least: int, most: int
) -> int:
    """The next step's token budget: ``least``, unless prompts would be late with that, at the level now in force.

    Then the largest of ``most`` and its halves with which a step keeps the pace of running requests: long steps compute
    prompts faster, because each reads the weights once.
    """
    chunk_s, _ = step_time_for_queue_s(setting.prefill, observation, state.mean_output_tokens)
    num_others = observation.max_num_batched_tokens - observation.prefill_tokens_per_step
    chunk_s *= max(least - num_others, 1) / max(observation.prefill_tokens_per_step, 1)
    if state.model.predict_s(state.level, least) <= chunk_s:
        return least
    pace_s = setting.decode.margin * setting.decode.budget_s
    budget = most
    while budget > least and state.model.predict_s(state.level, budget) > pace_s:
        budget //= 2
    return max(budget, least)


def observe_step(
    state: GovernorState, level: int, num_tokens: int, step_time_s: float, num_exact: int = 0
) -> GovernorState:
    """Learn from a step that ran wholly at ``level``, but for ``num_exact`` of its tokens."""
    return replace(state, model=state.model.observe(level, num_tokens, step_time_s, num_exact))


def observe_finish(state: GovernorState, num_output_tokens: int) -> GovernorState:
    """Learn how long answers are."""
    mean = state.mean_output_tokens
    return replace(state, mean_output_tokens=mean + OUTPUT_LENGTH_GAIN * (num_output_tokens - mean))


def observe_arrival(state: GovernorState, now_s: float) -> GovernorState:
    """Count a request that came at ``now_s``."""
    rate = _arrivals_per_s(state, now_s)
    return replace(state, arrivals_per_s=rate + 1 / _memory_s(state), arrived_s=now_s)


def sample_positions(num_waiting: int) -> list[int]:
    """Which queue positions (from 0) to look at: all of a short queue, evenly spread over a long one, ends included."""
    if num_waiting <= MAX_QUEUE_SAMPLES:
        return list(range(num_waiting))
    last = num_waiting - 1
    return sorted({round(i * last / (MAX_QUEUE_SAMPLES - 1)) for i in range(MAX_QUEUE_SAMPLES)})


def step_time_for_queue_s(
    setting: PhaseSetting, observation: StepObservation, mean_output_tokens: float, prompt_margin: float = 1.0
) -> tuple[float, float]:
    """The longest (chunk, step) with which every sampled waiting request still gets its first token in time.

    Prompts may take ``prompt_margin`` of the promise where that is less than the setting's margin.
    """
    steps_per_place = mean_output_tokens / observation.max_num_seqs
    prompts_s = min(prompt_margin, setting.margin) * setting.budget_s
    chunk_s = step_s = math.inf
    for request in observation.waiting:
        left_s = setting.margin * setting.budget_s - request.waited_s
        chunks = request.prefill_tokens / max(observation.prefill_tokens_per_step, 1)
        places_missing = max(0, request.position - observation.num_free_slots)
        chunk_s = min(chunk_s, (prompts_s - request.waited_s) / chunks) if chunks > 1 else chunk_s
        step_s = min(step_s, left_s / (places_missing * steps_per_place + 1))
    return chunk_s, step_s


def prompt_margin(full_chunk_s: Sequence[float]) -> float:
    """The share of the TTFT promise that a queue of prompts may take before dimming gets a head start on it, by the
    seconds that a step full of prompt tokens takes at each level.

    Decoding can be dimmed to half of its time and less, so that a burst met late is still carried. Prompts cannot: the
    deepest level is r = full_chunk_s[0] / min(full_chunk_s) times as fast, not much more than 1, and what arrives at
    more than r times the rate that level 0 computes will break the promise anyhow. How soon is all that dimming can
    change. A queue that grows at rho times what level 0 computes, dimmed for from a wait of D on, breaks a promise B
    so much earlier than if the deepest level had been in force throughout, that the share D / (rho * B) of what that
    would have spared is lost. With rho > r it is at most FORFEIT_FRAC if D <= FORFEIT_FRAC * r * B.

    Most such queues are gone after a few steps, and nobody can know beforehand which will not be. So a head start ends
    with its queue: DOWN_S would cost many times the loss of the steps themselves.
    """
    return FORFEIT_FRAC * full_chunk_s[0] / min(full_chunk_s)


def _smooth(state: GovernorState, observation: StepObservation, now_s: float) -> GovernorState:
    gain = 1.0 - math.exp(-(now_s - state.updated_s) / SMOOTHING_S)
    num_tokens, num_exact = observation.num_tokens, observation.num_exact
    predicted = (state.model.predict_s(level, num_tokens, num_exact) for level in range(state.model.num_levels))
    smoothed = tuple(m + gain * (p - m) for m, p in zip(state.smoothed_s, predicted, strict=True))
    return replace(state, smoothed_s=smoothed, updated_s=now_s)


def _least_level(step_s_by_level: Sequence[float], longest_s: float) -> int:
    """The least level whose step fits into longest_s; if none does, the least that is about as fast as any."""
    for level, step_s in enumerate(step_s_by_level):
        if step_s <= longest_s:
            return level
    fastest_s = min(step_s_by_level) * (1 + USELESS_FRAC)
    return next(level for level, step_s in enumerate(step_s_by_level) if step_s <= fastest_s)


def _level_for_pace(state: GovernorState, setting: PhaseSetting) -> int:
    return _least_level(state.smoothed_s, setting.margin * setting.budget_s)


def _level_for_queue(state: GovernorState, setting: PhaseSetting, observation: StepObservation) -> int:
    if not observation.waiting:
        return 0
    full_chunk_s = _predicted_s(state, observation, observation.max_num_batched_tokens)
    chunk_s, step_s = step_time_for_queue_s(setting, observation, state.mean_output_tokens)
    level = _least_level(state.smoothed_s, step_s)
    return level if chunk_s == math.inf else max(level, _least_level(full_chunk_s, chunk_s))


def _head_start(state: GovernorState, setting: PhaseSetting, observation: StepObservation) -> int:
    """The level for a queue of prompts that is longer than `prompt_margin` allows, 0 without one: one prompt alone is
    no queue, and where the batch is full, requests wait for others to decode."""
    if len(observation.waiting) < 2 or not observation.num_free_slots:
        return 0
    full_chunk_s = _predicted_s(state, observation, observation.max_num_batched_tokens)
    margin = prompt_margin(full_chunk_s)
    chunk_s, _ = step_time_for_queue_s(setting, observation, state.mean_output_tokens, margin)
    return 0 if chunk_s == math.inf else _least_level(full_chunk_s, chunk_s)


def _level_for_arrivals(state: GovernorState, observation: StepObservation, now_s: float) -> int:
    """The least level at which a full batch finishes CARRIED_FRAC of the requests that arrive."""
    places_per_s = CARRIED_FRAC * _arrivals_per_s(state, now_s) * state.mean_output_tokens
    if not places_per_s:
        return 0
    full_s = _predicted_s(state, observation, observation.max_num_seqs)
    full_s = [max(m, f) for m, f in zip(state.smoothed_s, full_s, strict=True)]
    return _least_level(full_s, observation.max_num_seqs / places_per_s)


def _predicted_s(state: GovernorState, observation: StepObservation, num_tokens: int) -> list[float]:
    """By level, for a step of ``num_tokens`` with as many exact tokens in proportion as the step to come."""
    num_exact = round(num_tokens * observation.num_exact / observation.num_tokens) if observation.num_tokens else 0
    return [state.model.predict_s(level, num_tokens, num_exact) for level in range(state.model.num_levels)]


def _memory_s(state: GovernorState) -> float:
    """Time constant of the arrival rate: short when there is much to go by."""
    shortest_s, longest_s = ARRIVALS_S
    return min(max(NUM_ARRIVALS / state.arrivals_per_s, shortest_s), longest_s) if state.arrivals_per_s else longest_s


def _arrivals_per_s(state: GovernorState, now_s: float) -> float:
    return state.arrivals_per_s * math.exp(min(0.0, state.arrived_s - now_s) / _memory_s(state))


def _within(setting: BrownoutSetting, level: int, top: int) -> Levels:
    return Levels(prefill=_clamp(level, setting.prefill, top), decode=_clamp(level, setting.decode, top))


def _clamp(level: int, setting: PhaseSetting, top: int) -> int:
    return min(max(level, min(setting.floor, top)), min(setting.ceiling, top))
