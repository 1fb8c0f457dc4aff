"""Measures at start how long a step takes at each brownout level, for the governor's model."""

from __future__ import annotations

import logging
from statistics import median
from typing import Protocol

from engine.config import EngineConfig, SchedulerConfig
from engine.step_time import StepTimeModel

logger = logging.getLogger(__name__)

PROFILE_SEED = 0
TOKEN_COUNTS = (1, 4, 16, 64, 256, 1024, 4096)
UNPROFILED_STEP_S = 0.05  # where the trim starts when there is no profile


class StepTimer(Protocol):
    """What can be profiled: a Runner, or a stand-in for one."""

    def time_step(self, num_tokens: int, level: int, seed: int) -> float:
        """Seconds of one step of ``num_tokens`` random decode rows."""
        ...


def profiled_token_counts(config: SchedulerConfig) -> tuple[int, ...]:
    """The step sizes to measure: powers of four, a full decode batch, and the longest step."""
    largest = (config.max_num_seqs, config.max_num_batched_tokens)
    return tuple(sorted({*(n for n in TOKEN_COUNTS if n < largest[1]), *largest}))


def profile_steps(runner: StepTimer, config: EngineConfig, num_levels: int) -> StepTimeModel:
    """Median of ``brownout.profile_repeats`` steps for each level and each of a few step sizes."""
    repeats = config.brownout.profile_repeats
    if repeats == 0:
        return StepTimeModel((1,), ((UNPROFILED_STEP_S,),) * num_levels)
    token_counts = profiled_token_counts(config.scheduler)
    runner.time_step(token_counts[-1], 0, PROFILE_SEED)  # the first step pays for lazy initialisation
    measured_s = [
        [median(runner.time_step(n, level, PROFILE_SEED + r) for r in range(repeats)) for n in token_counts]
        for level in range(num_levels)
    ]
    model = StepTimeModel.fit(token_counts, measured_s)
    for level, times_s in enumerate(model.times_s):
        row = ", ".join(f"{n}: {t * 1e3:.1f}" for n, t in zip(token_counts, times_s, strict=True))
        logger.info("step time at level %d, ms by tokens: %s", level, row)
    return model
