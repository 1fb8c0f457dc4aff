"""How long a step takes at each brownout level: a measured profile, corrected online. Pure.

t(level, num_tokens) = trim * piecewise-linear interpolation of the profile in num_tokens. The profile is made monotone:
a deeper level is never slower, more tokens are never faster. The trim follows what the profile cannot know (a slower
clock, neighbours on the same host) and is what the telemetry reports as the model's error.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace

TRIM_GAIN = 0.05  # share of the newest relative error that enters the trim
TRIM_BOUNDS = (0.5, 3.0)


@dataclass(frozen=True, slots=True)
class StepTimeModel:
    """``times_s[level][i]`` is the step time for ``token_counts[i]`` tokens (ascending)."""

    token_counts: tuple[int, ...]
    times_s: tuple[tuple[float, ...], ...]
    trim: float = 1.0

    @staticmethod
    def fit(token_counts: tuple[int, ...], measured_s: list[list[float]]) -> StepTimeModel:
        """The least monotone majorant in tokens, then the cumulative minimum over levels."""
        rows: list[tuple[float, ...]] = []
        for row in measured_s:
            rising = [max(row[: i + 1]) for i in range(len(row))]
            rows.append(tuple(min(t, p) for t, p in zip(rising, rows[-1], strict=True)) if rows else tuple(rising))
        return StepTimeModel(token_counts, tuple(rows))

    @property
    def num_levels(self) -> int:
        return len(self.times_s)

    def predict_s(self, level: int, num_tokens: int) -> float:
        """Beyond the profile's ends the nearest segment is continued."""
        counts, times = self.token_counts, self.times_s[level]
        if len(counts) == 1:
            return self.trim * times[0]
        i = min(max(bisect_right(counts, num_tokens) - 1, 0), len(counts) - 2)
        slope = (times[i + 1] - times[i]) / (counts[i + 1] - counts[i])
        return self.trim * (times[i] + slope * (num_tokens - counts[i]))

    def observe(self, level: int, num_tokens: int, measured_s: float) -> StepTimeModel:
        """Move the trim a little towards what a step really took."""
        raw_s = self.predict_s(level, num_tokens) / self.trim
        ratio = measured_s / raw_s if raw_s > 0 else 1.0
        low, high = TRIM_BOUNDS
        ratio = min(max(ratio, low), high)  # one stalled step must not carry the model away
        return replace(self, trim=min(max(self.trim + TRIM_GAIN * (ratio - self.trim), low), high))
