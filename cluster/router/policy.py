"""Which replica a request goes to: filter, score in [0, 1], pick. Pure: no Redis, no Ray, no clock.

A replica publishes what its governor goes by: the step-time model, the setting in force, its queue. So the router
predicts what the governor will do with one request more: the level it takes to keep TTFT and TPOT, and the TTFT then.

| replicas                                              | answer                                             |
|-------------------------------------------------------|----------------------------------------------------|
| none with a live load                                 | None: no opinion                                   |
| some with a live load, some without                   | only those with one; the others go last            |
| some nearly out of KV blocks                          | they go after the others                           |
| unlike in the level predicted with this request       | least level first, whatever the rest says          |
| ... and the request refuses to be dimmed              | the level now counts too: undimmed replicas first  |
| level equal, one has the prompt's beginning cached    | that one, unless it holds far more than the mean   |
| level equal, one is the session's home                | that one, unless it holds far more than the mean   |
| else                                                  | least predicted TTFT, then fewest requests held    |
| all equal                                             | drawn at random                                    |

Requests on their way to a replica (picks) count as held, and their prompts as queued: prompts differ a hundredfold, and
while a burst of them arrives, most are on their way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from engine.brownout import Brownout
from engine.governor import prompt_margin
from engine.step_time import StepTimeModel
from engine.types import EngineStats, PhaseSetting

# The score within a level; they add up to 1.
WEIGHT_TTFT = 0.5
WEIGHT_AFFINITY = 0.3
WEIGHT_HELD = 0.2
AFFINITY_BOUND = 1.25  # times the mean number held: no affinity beyond it (bounded loads, arXiv 1608.01350)
AFFINITY_SLACK = 2  # requests that a replica may hold over the bound anyway, or an idle cluster had no affinity
FULL_KV_FRAC = 0.95
UNLIMITED = PhaseSetting(0, 0, float("inf"))
ARRIVALS_S = 3.0  # time constant of a replica's arrival rate
UNKNOWN_STEP_S = 0.05  # of a replica that has no profile; equal for all, so it decides nothing


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """A replica's last published load. ``sequence`` grows by one with each publication.

    ``step_time``, ``prefill`` and ``decode`` are the governor's model and limits; without them the level is unknown
    and taken to be 0. ``mean_output_tokens`` and ``arrivals_per_s`` describe the traffic here.
    """

    sequence: int
    num_running: int
    num_waiting: int
    max_num_seqs: int
    queued_prefill_tokens: int
    max_num_batched_tokens: int
    kv_used_frac: float
    level: int = 0  # of the newest step
    step_time: StepTimeModel | None = None
    prefill: PhaseSetting = UNLIMITED
    decode: PhaseSetting = UNLIMITED
    mean_output_tokens: float = 64.0
    arrivals_per_s: float = 0.0

    @staticmethod
    def of(
        stats: EngineStats,
        brownout: Brownout,
        now_s: float,
        *,
        sequence: int,
        max_num_batched_tokens: int,
        arrivals_per_s: float,
    ) -> ReplicaLoad:
        """What a replica publishes at ``now_s`` on its engine's clock."""
        setting = brownout.in_force(now_s)
        return ReplicaLoad(
            sequence=sequence,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            max_num_seqs=stats.max_num_seqs,
            queued_prefill_tokens=stats.queued_prefill_tokens,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_used_frac=stats.kv_used_frac,
            level=stats.levels.peak,
            step_time=brownout.governor.model,
            prefill=setting.prefill,
            decode=setting.decode,
            mean_output_tokens=brownout.governor.mean_output_tokens,
            arrivals_per_s=arrivals_per_s,
        )

    @property
    def num_levels(self) -> int:
        return self.step_time.num_levels if self.step_time else 1

    @property
    def held(self) -> int:
        return self.num_running + self.num_waiting


@dataclass(frozen=True, slots=True)
class Demand:
    """What of a request matters. ``cached_tokens``: replica_id |-> prompt tokens that it probably has cached."""

    num_prompt_tokens: int = 0
    exact: bool = False  # refuses to be dimmed
    cached_tokens: Mapping[str, int] = field(default_factory=dict)
    home: str | None = None  # the session's replica


@dataclass(frozen=True, slots=True)
class Picked:
    """What was sent to a replica that its published load cannot show yet."""

    num_requests: int = 0
    prompt_tokens: int = 0  # those that it must compute


@dataclass(frozen=True, slots=True)
class Prediction:
    """What accepting the request will mean."""

    level: int
    ttft_s: float


def rank(
    replica_ids: Sequence[str],
    loads: Mapping[str, ReplicaLoad],
    picked: Mapping[str, Picked],
    draw: Callable[[], float],
    demand: Demand = Demand(),
) -> list[str] | None:
    """Replicas in the order in which to try them, or None for "no opinion". ``draw`` breaks ties."""
    known = [replica_id for replica_id in replica_ids if replica_id in loads]
    if not known:
        return None
    on_way = {replica_id: picked.get(replica_id, Picked()) for replica_id in known}
    held = {replica_id: loads[replica_id].held + on_way[replica_id].num_requests for replica_id in known}
    bound = AFFINITY_BOUND * sum(held.values()) / len(held) + AFFINITY_SLACK
    keyed = []
    for replica_id in known:
        load = loads[replica_id]
        affinity = _affinity(replica_id, demand) if held[replica_id] <= bound else 0.0
        has_room = load.kv_used_frac < FULL_KV_FRAC
        keyed.append((has_room, score(load, on_way[replica_id], demand, affinity), draw(), replica_id))
    unknown = [replica_id for replica_id in replica_ids if replica_id not in loads]
    return [replica_id for *_, replica_id in sorted(keyed, reverse=True)] + unknown


def score(load: ReplicaLoad, picked: Picked, demand: Demand = Demand(), affinity: float = 0.0) -> float:
    """1 for an idle replica, towards 0 with level, TTFT and load; strictly falling in requests held.

    Levels are kept apart: a replica at a lower level always scores more. ``affinity`` is in [0, 1].
    """
    prompt_tokens = picked.prompt_tokens + demand.num_prompt_tokens * (1 - affinity)
    prediction = predict(load, picked.num_requests, prompt_tokens)
    level = max(prediction.level, load.level) if demand.exact else prediction.level
    held = load.held + picked.num_requests
    cost = (
        WEIGHT_TTFT * prediction.ttft_s / (prediction.ttft_s + 1)
        + WEIGHT_AFFINITY * (1 - affinity)
        + WEIGHT_HELD * held / (held + load.max_num_seqs)
    )
    return 1 - (min(level, load.num_levels - 1) + cost) / load.num_levels


def predict(load: ReplicaLoad, num_picked: int, num_prompt_tokens: float = 0) -> Prediction:
    """What the replica's governor will do with one request more: the least level that keeps TPOT and TTFT, and at
    which a full batch finishes requests as fast as they arrive.

    Without the last, a dimmed replica would seem idle because it is quick, and be sent what keeps it dimmed.
    ``num_prompt_tokens``: its own, and those of the picks. Steps full of them take longer than those of decoding rows.
    """
    held = load.held + num_picked + 1
    rows = min(held, load.max_num_seqs)
    prefill_steps = (load.queued_prefill_tokens + num_prompt_tokens) / load.max_num_batched_tokens
    # Places become free one by one: max_num_seqs / mean output length of them in each step (Little's law).
    steps_to_place = (held - rows) * load.mean_output_tokens / load.max_num_seqs
    model = load.step_time
    if model is None:
        return Prediction(0, (1 + max(prefill_steps, steps_to_place)) * UNKNOWN_STEP_S)

    chunk_s = [model.predict_s(level, load.max_num_batched_tokens) for level in range(model.num_levels)]
    is_queue_of_prompts = held < load.max_num_seqs and (num_picked > 0 or load.queued_prefill_tokens > 0)
    most = prompt_margin(chunk_s) if is_queue_of_prompts else 1.0
    prompts_s = min(most, load.prefill.margin) * load.prefill.budget_s

    def ttft_s(level: int, step_s: float) -> float:
        return step_s + max(prefill_steps * chunk_s[level], steps_to_place * step_s)

    floor = min(max(load.prefill.floor, load.decode.floor), model.num_levels - 1)
    ceiling = min(max(load.prefill.ceiling, load.decode.ceiling), model.num_levels - 1)
    places_per_s = (load.arrivals_per_s + (num_picked + 1) / ARRIVALS_S) * load.mean_output_tokens
    for level in range(floor, ceiling + 1):
        step_s = model.predict_s(level, rows)
        keeps_tpot = step_s <= load.decode.margin * load.decode.budget_s
        keeps_ttft = ttft_s(level, step_s) <= load.prefill.margin * load.prefill.budget_s
        keeps_ttft = keeps_ttft and (prefill_steps <= 1 or prefill_steps * chunk_s[level] <= prompts_s)
        keeps_up = places_per_s * model.predict_s(level, load.max_num_seqs) <= load.max_num_seqs
        if keeps_tpot and keeps_ttft and keeps_up:
            return Prediction(level, ttft_s(level, step_s))
    return Prediction(ceiling, ttft_s(ceiling, model.predict_s(ceiling, rows)))


def _affinity(replica_id: str, demand: Demand) -> float:
    """The share of the prompt that need not be computed again; 1 for the session's home."""
    if replica_id == demand.home:
        return 1.0
    if not demand.num_prompt_tokens:
        return 0.0
    return min(1.0, demand.cached_tokens.get(replica_id, 0) / demand.num_prompt_tokens)
