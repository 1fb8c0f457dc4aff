"""How long a step takes at each brownout level: a measured profile, corrected online. Pure.

    t(level, n) = trim * (T(0, n) - saving * (T(0, n) - T(level, n)))

T is the piecewise-linear interpolation of the profile in the number of tokens, made monotone: a deeper level is never
slower, more tokens are never faster. ``trim`` follows what makes every step slower than profiled (a slower clock, long
contexts, neighbours), ``saving`` how much of the profiled saving the levels really give. A step at level 0 teaches the
trim alone, a dimmed one both, each by its share of what could explain the error.

Rows that refuse to be dimmed keep their experts active, so a step is never predicted faster than T(0, their number).
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace

GAIN = 0.05  # share of the newest relative error that is corrected
TRIM_BOUNDS = (0.5, 3.0)
SAVING_BOUNDS = (0.1, 1.5)
SAVING_WEIGHT = 4.0  # the saving is so many times less certain (in variance) than the time of an undimmed step
ERROR_GAIN = 0.02  # of the moving average of the prediction error


@dataclass(frozen=True, slots=True)
class StepTimeModel:
    """``times_s[level][i]`` is the step time for ``token_counts[i]`` tokens (ascending)."""

    token_counts: tuple[int, ...]
    times_s: tuple[tuple[float, ...], ...]
    trim: float = 1.0
    saving: float = 1.0
    error_frac: float = 0.0  # moving average of |predicted - measured| / measured

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

    def predict_s(self, level: int, num_tokens: int, num_exact: int = 0) -> float:
        """Seconds of a step of ``num_tokens``, ``num_exact`` of them rows that are never dimmed."""
        undimmed_s = self._profiled_s(0, num_tokens)
        step_s = undimmed_s - self.saving * (undimmed_s - self._profiled_s(level, num_tokens)) if level else undimmed_s
        if level and num_exact:
            step_s = max(step_s, self._profiled_s(0, num_exact))
        return self.trim * max(step_s, 0.0)

    def observe(self, level: int, num_tokens: int, measured_s: float, num_exact: int = 0) -> StepTimeModel:
        """Move trim and saving a little towards what a step really took."""
        predicted_s = self.predict_s(level, num_tokens, num_exact)
        if predicted_s <= 0:
            return self
        low, high = TRIM_BOUNDS
        # One stalled step must not carry the model away.
        ratio = min(max(self.trim * measured_s / predicted_s, low), high) / self.trim
        error_frac = self.error_frac + ERROR_GAIN * (abs(1 - 1 / ratio) - self.error_frac)
        undimmed_s = self._profiled_s(0, num_tokens)
        saved_s = undimmed_s - self._profiled_s(level, num_tokens) if not num_exact else 0.0
        share = undimmed_s**2 / (undimmed_s**2 + SAVING_WEIGHT * saved_s**2) if saved_s > 0 else 1.0
        correction_s = GAIN * (ratio - 1) * predicted_s
        # At level 0 the share is 1 and undimmed_s is what the trim multiplies.
        base_s = undimmed_s if saved_s > 0 else predicted_s / self.trim
        trim = min(max(self.trim + share * correction_s / base_s, low), high)
        saving = self.saving
        if saved_s > 0:
            saving = self.saving - (1 - share) * correction_s / (self.trim * saved_s)
            saving = min(max(saving, SAVING_BOUNDS[0]), SAVING_BOUNDS[1])
        return replace(self, trim=trim, saving=saving, error_frac=error_frac)

    def _profiled_s(self, level: int, num_tokens: int) -> float:
        """Beyond the profile's ends the nearest segment is continued."""
        counts, times = self.token_counts, self.times_s[level]
        if len(counts) == 1:
            return times[0]
        i = min(max(bisect_right(counts, num_tokens) - 1, 0), len(counts) - 2)
        slope = (times[i + 1] - times[i]) / (counts[i + 1] - counts[i])
        return times[i] + slope * (num_tokens - counts[i])
