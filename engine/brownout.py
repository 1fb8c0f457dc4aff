"""The live side of brownout in one replica: the setting in force, its lease, and the governor's state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from engine.config import EngineConfig, SloConfig
from engine.governor import (
    GovernorState,
    StepObservation,
    Waiting,
    choose_budget,
    choose_levels,
    observe_arrival,
    observe_finish,
    observe_step,
    sample_positions,
)
from engine.scheduler.scheduler import ScheduledBatch, Scheduler
from engine.step_time import StepTimeModel
from engine.types import BrownoutSetting, Levels, Phase, PhaseSetting, ServiceClass

MAX_QUEUE_LOOKED_AT = 256  # a step must not cost more the longer the queue is
SAFE_MARGIN = 0.8  # of the SLO that the safe policy plans for: it has nobody to correct its bias
EXACT = BrownoutSetting.pinned(0)


def safe_setting(last: BrownoutSetting, slo: SloConfig) -> BrownoutSetting:
    """What holds when no controller renews the lease: the governor alone keeps the SLO.

    It never dims deeper than the last setting allowed, so brownout that was switched off stays off.
    """
    return replace(
        last,
        prefill=PhaseSetting(0, last.prefill.ceiling, slo.ttft_s, SAFE_MARGIN),
        decode=PhaseSetting(0, last.decode.ceiling, slo.tpot_s, SAFE_MARGIN),
        law="safe",
        reason="lease_expired",
    )


class Brownout:
    """Applies settings and chooses levels. ``may_dim`` False: the ladder's losses are unknown, so level 0 always."""

    def __init__(self, model: StepTimeModel, config: EngineConfig, may_dim: bool) -> None:
        self._config = config.scheduler
        self._slo = config.slo
        self._safe_policy = config.brownout.safe_policy
        self._may_dim = may_dim
        self.governor = GovernorState.initial(model)
        self.levels = Levels()  # of the last step
        self.observation = StepObservation(num_tokens=0)  # what they were chosen by
        self._step_ended_s = float("inf")
        self._in_force = (EXACT, float("inf"))  # newest setting and when its lease ends; replaced as one

    def apply(self, setting: BrownoutSetting, now_s: float) -> bool:
        """Put a setting in force, or renew its lease; False if a newer one is in force.

        One thread applies; the engine's thread may read meanwhile.
        """
        if self.newest.newer_than(setting):
            return False
        self._in_force = (setting, now_s + setting.lease_s)
        return True

    @property
    def newest(self) -> BrownoutSetting:
        return self._in_force[0]

    def lease_expired(self, now_s: float) -> bool:
        return now_s > self._in_force[1]

    def setting(self, now_s: float) -> BrownoutSetting:
        """The newest setting while its lease lasts, then the safe policy."""
        newest, lease_ends_s = self._in_force
        if now_s <= lease_ends_s:
            return newest
        return safe_setting(newest, self._slo) if self._safe_policy == "governor" else EXACT

    def in_force(self, now_s: float) -> BrownoutSetting:
        """What the governor obeys."""
        return self.setting(now_s) if self._may_dim else EXACT

    def choose(self, scheduler: Scheduler, batch: ScheduledBatch, now_s: float) -> Levels:
        """The level of the scheduled step."""
        setting = self.in_force(now_s)
        self.observation = self._observe(scheduler, batch, now_s)
        self.governor, self.levels = choose_levels(self.governor, setting, self.observation, now_s)
        if self._config.chunk_tokens is not None:
            limits = (self._config.chunk_tokens, self._config.max_num_batched_tokens)
            scheduler.token_budget = choose_budget(self.governor, setting, self.observation, *limits)
        return self.levels

    def predict_step_s(self, batch: ScheduledBatch, levels: Levels) -> float | None:
        """How long the batch should take at ``levels``; None where `learn_step` would not learn from it.

        Call it before `learn_step`, or the prediction would know the answer.
        """
        level = _level_of(batch, levels)
        return None if level is None else self.governor.model.predict_s(level, batch.num_tokens, _num_exact(batch))

    def learn_step(self, batch: ScheduledBatch, levels: Levels, step_time_s: float, now_s: float) -> None:
        """A step ended at ``now_s``: correct the step-time model, if both phases ran at one level.

        With rows only that refuse to be dimmed, that was level 0.
        """
        self._step_ended_s = now_s
        level = _level_of(batch, levels)
        if level is not None:
            num_exact = _num_exact(batch) if level else 0
            self.governor = observe_step(self.governor, level, batch.num_tokens, step_time_s, num_exact)

    def learn_arrival(self, now_s: float) -> None:
        self.governor = observe_arrival(self.governor, now_s)

    def learn_finish(self, num_output_tokens: int) -> None:
        self.governor = observe_finish(self.governor, num_output_tokens)

    def predicted_step_s(self, level: int) -> float:
        """At the recent batch shape."""
        return self.governor.smoothed_s[level]

    def _observe(self, scheduler: Scheduler, batch: ScheduledBatch, now_s: float) -> StepObservation:
        waiting = []
        prefill_tokens = 0
        for sequence in scheduler.running:
            if not sequence.decoding:
                prefill_tokens += sequence.num_uncomputed
                if sequence.first_token_s is None:
                    waiting.append(Waiting(0, now_s - sequence.arrival_s, prefill_tokens))
        num_waiting = len(scheduler.waiting)
        sampled = set(sample_positions(min(num_waiting, MAX_QUEUE_LOOKED_AT)))
        for index, sequence in enumerate(islice(scheduler.waiting, MAX_QUEUE_LOOKED_AT)):
            prefill_tokens += sequence.num_uncomputed
            if index in sampled and sequence.first_token_s is None:
                waiting.append(Waiting(index + 1, now_s - sequence.arrival_s, prefill_tokens))
        return StepObservation(
            num_tokens=batch.num_tokens,
            num_exact=_num_exact(batch),
            idle_s=max(0.0, now_s - self._step_ended_s),
            waiting=waiting,
            num_free_slots=scheduler.num_free_slots,
            max_num_seqs=self._config.max_num_seqs,
            num_held=len(scheduler.running) + num_waiting,
            prefill_tokens_per_step=scheduler.token_budget - batch.num_decode_tokens,
            max_num_batched_tokens=scheduler.token_budget,
        )


def _level_of(batch: ScheduledBatch, levels: Levels) -> int | None:
    """The one level at which the whole batch runs; None if its phases differ."""
    if all(item.sequence.exact for item in batch):
        return 0
    return levels.decode if levels.prefill == levels.decode or not batch.prefills else None


def _num_exact(batch: ScheduledBatch) -> int:
    """Tokens of requests that refuse to be dimmed."""
    return sum(item.num_tokens for item in batch if item.sequence.exact)


def spent_by_class(
    batch: ScheduledBatch, levels: Levels, level_loss: Sequence[float]
) -> dict[ServiceClass, tuple[int, float]]:
    """class |-> (tokens of the step, sum of their quality loss in nats); no loss where none has been measured."""
    num_tokens: dict[tuple[ServiceClass, bool, Phase], int] = {}
    for item in batch:
        key = (item.sequence.request.service_class, item.sequence.exact, item.phase)
        num_tokens[key] = num_tokens.get(key, 0) + item.num_tokens
    spent: dict[ServiceClass, tuple[int, float]] = {}
    for (service_class, exact, phase), tokens in num_tokens.items():
        loss_nats = level_loss[0 if exact else levels.of(phase)] if level_loss else 0.0
        before, lost_nats = spent.get(service_class, (0, 0.0))
        spent[service_class] = (before + tokens, lost_nats + tokens * loss_nats)
    return spent
