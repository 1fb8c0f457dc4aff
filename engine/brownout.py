"""The live side of brownout in one replica: the setting in force, its lease, and the governor's state."""

from __future__ import annotations

from engine.config import SchedulerConfig
from engine.governor import (
    GovernorState,
    StepObservation,
    Waiting,
    choose_levels,
    observe_finish,
    observe_step,
    sample_positions,
)
from engine.scheduler.scheduler import ScheduledBatch, Scheduler
from engine.step_time import StepTimeModel
from engine.types import BrownoutSetting, Levels


class Brownout:
    """Applies settings and chooses levels. ``may_dim`` False: the ladder's losses are unknown, so level 0 always."""

    def __init__(self, model: StepTimeModel, config: SchedulerConfig, may_dim: bool) -> None:
        self._config = config
        self._may_dim = may_dim
        self.governor = GovernorState.initial(model)
        self.levels = Levels()  # of the last step
        self._safe = BrownoutSetting.pinned(0)
        self._in_force = (self._safe, float("inf"))  # newest setting and when its lease ends; replaced as one

    def apply(self, setting: BrownoutSetting, now_s: float) -> bool:
        """Put a setting in force, or renew its lease; False if a newer one is in force. Safe from any thread."""
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
        return newest if now_s <= lease_ends_s else self._safe

    def choose(self, scheduler: Scheduler, batch: ScheduledBatch, now_s: float) -> Levels:
        """The level of the scheduled step."""
        if self._may_dim:
            observation = self._observe(scheduler, batch, now_s)
            self.governor, self.levels = choose_levels(self.governor, self.setting(now_s), observation, now_s)
        return self.levels

    def learn_step(self, batch: ScheduledBatch, step_time_s: float) -> None:
        """Correct the step-time model, if the step ran at one level."""
        if self.levels.prefill == self.levels.decode or not batch.prefills:
            self.governor = observe_step(self.governor, self.levels.decode, batch.num_tokens, step_time_s)

    def learn_finish(self, num_output_tokens: int) -> None:
        self.governor = observe_finish(self.governor, num_output_tokens)

    def predicted_step_s(self, level: int) -> float:
        """At the recent batch shape."""
        return self.governor.smoothed_s[level]

    def _observe(self, scheduler: Scheduler, batch: ScheduledBatch, now_s: float) -> StepObservation:
        sampled = set(sample_positions(len(scheduler.waiting)))
        prefill_tokens = scheduler.queued_prefill_tokens - scheduler.waiting.num_tokens  # of running sequences
        waiting = []
        for index, sequence in enumerate(scheduler.waiting):
            prefill_tokens += sequence.num_uncomputed
            if index in sampled and sequence.first_token_s is None:
                waiting.append(Waiting(index + 1, now_s - sequence.arrival_s, prefill_tokens))
        return StepObservation(
            num_tokens=batch.num_tokens,
            waiting=waiting,
            num_free_slots=scheduler.num_free_slots,
            max_num_seqs=self._config.max_num_seqs,
            prefill_tokens_per_step=self._config.max_num_batched_tokens - batch.num_decode_tokens,
        )
