"""A quantile sketch to collect samples in; the controller merges what many replicas collected. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

RELATIVE_ERROR = 0.01  # of every quantile; the controller merges sketches of this resolution only
_LOG_GAMMA = math.log((1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR))


@dataclass(slots=True)
class QuantileSketch:
    """A log-bucketed histogram (DDSketch, VLDB 2019) of non-negative values, as telemetry.proto defines it."""

    counts: dict[int, int] = field(default_factory=dict)  # bucket |-> number of values
    zero_count: int = 0
    total: float = 0.0

    def add(self, value: float) -> None:
        if value > 0:
            bucket = math.ceil(math.log(value) / _LOG_GAMMA)
            self.counts[bucket] = self.counts.get(bucket, 0) + 1
            self.total += value
        else:
            self.zero_count += 1

    @property
    def num_values(self) -> int:
        return self.zero_count + sum(self.counts.values())
