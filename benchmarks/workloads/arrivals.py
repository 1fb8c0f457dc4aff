"""When requests arrive: a renewal process whose rate changes from phase to phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class RatePhase:
    """``rate_req_s`` requests per second on average for ``duration_s`` seconds."""

    duration_s: float
    rate_req_s: float

    def __post_init__(self) -> None:
        if not (self.duration_s > 0 and self.rate_req_s > 0):
            raise ValueError(f"duration_s {self.duration_s} and rate_req_s {self.rate_req_s} must be positive")


def draw_times(phases: Sequence[RatePhase], seed: int, cv: float = 1.0) -> list[float]:
    """Arrival times in seconds from the first phase's start, ascending.

    Gaps are gamma distributed with coefficient of variation ``cv``: 1 is a Poisson process, more is burstier.
    Each phase starts its process anew and has its own random stream, so changing one phase leaves the others alone.
    """
    times_s: list[float] = []
    phase_start_s = 0.0
    for index, phase in enumerate(phases):
        rng = np.random.default_rng([seed, index])
        shape = 1 / cv**2
        mean_gap_s = 1 / phase.rate_req_s
        at_s = rng.gamma(shape, mean_gap_s / shape)
        while at_s < phase.duration_s:
            times_s.append(phase_start_s + at_s)
            at_s += rng.gamma(shape, mean_gap_s / shape)
        phase_start_s += phase.duration_s
    return times_s
