"""Measures at start how long a step takes at each brownout level, for the governor's model."""

from __future__ import annotations

import logging
from statistics import median

from engine.config import EngineConfig
from engine.runner import Runner
from engine.step_time import StepTimeModel

logger = logging.getLogger(__name__)

PROFILE_SEED = 0
SMALL_TOKEN_COUNTS = (1, 4, 16)
UNPROFILED_STEP_S = 0.05  # where the trim starts when there is no profile


def profile_steps(runner: Runner, config: EngineConfig, num_levels: int) -> StepTimeModel:
    """Median of ``brownout.profile_repeats`` steps for each level and each of a few step sizes."""
    repeats = config.brownout.profile_repeats
    if repeats == 0:
        return StepTimeModel((1,), ((UNPROFILED_STEP_S,),) * num_levels)
    largest = (config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens)
    token_counts = tuple(sorted({*(n for n in SMALL_TOKEN_COUNTS if n < largest[1]), *largest}))
    runner.time_step(largest[1], 0, PROFILE_SEED)  # the first step pays for lazy initialisation
    measured_s = [
        [median(runner.time_step(n, level, PROFILE_SEED + r) for r in range(repeats)) for n in token_counts]
        for level in range(num_levels)
    ]
    model = StepTimeModel.fit(token_counts, measured_s)
    for level, times_s in enumerate(model.times_s):
        row = ", ".join(f"{n}: {t * 1e3:.1f}" for n, t in zip(token_counts, times_s, strict=True))
        logger.info("step time at level %d, ms by tokens: %s", level, row)
    return model
