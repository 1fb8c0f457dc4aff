"""Mergeable quantile sketch: a log-bucketed histogram (DDSketch, VLDB 2019) as telemetry.proto defines it.

With a = relative_error and gamma = (1 + a) / (1 - a), bucket b holds the values in (gamma^(b-1), gamma^b] and stands
for 2 * gamma^b / (gamma + 1). Merging adds counts, so a sketch of sketches is as exact as one sketch of all values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

RELATIVE_ERROR = 0.01


class SketchMismatchError(ValueError):
    """Two sketches of different resolution cannot be merged."""


@dataclass(frozen=True, slots=True)
class QuantileSketch:
    """Counts of non-negative values by bucket. Immutable: sums are made with ``merged``."""

    relative_error: float = RELATIVE_ERROR
    counts: Mapping[int, int] = field(default_factory=dict)  # bucket |-> number of values
    zero_count: int = 0  # values that are exactly zero
    total: float = 0.0  # sum of all values

    @property
    def num_values(self) -> int:
        return self.zero_count + sum(self.counts.values())

    def quantile(self, q: float) -> float | None:
        """The value at rank floor(q * (n - 1)) of the n sorted values, within ``relative_error``; None if n is 0."""
        if not 0 <= q <= 1:
            raise ValueError(f"quantile {q} must be in [0, 1]")
        num_values = self.num_values
        if num_values == 0:
            return None
        rank = math.floor(q * (num_values - 1))
        num_below = self.zero_count
        if rank < num_below:
            return 0.0
        gamma = (1 + self.relative_error) / (1 - self.relative_error)
        for bucket, count in sorted(self.counts.items()):
            num_below += count
            if rank < num_below:
                return float(2 * gamma**bucket / (gamma + 1))
        raise AssertionError("counts changed while they were read")

    @staticmethod
    def merged(sketches: Iterable[QuantileSketch]) -> QuantileSketch:
        """One sketch of all values; SketchMismatchError if resolutions differ."""
        whole = SketchSum()
        for sketch in sketches:
            whole.add(sketch)
        return whole.value()

    @staticmethod
    def of(values: Iterable[float], relative_error: float = RELATIVE_ERROR) -> QuantileSketch:
        """The sketch of ``values``, each finite and not negative."""
        counts: dict[int, int] = {}
        zero_count, total = 0, 0.0
        for value, bucket in _bucketed(values, relative_error):
            total += value
            if bucket is None:
                zero_count += 1
            else:
                counts[bucket] = counts.get(bucket, 0) + 1
        return QuantileSketch(relative_error, counts, zero_count, total)


class SketchSum:
    """A sketch that grows: adding to it costs what the added sketch holds, however much is in it already."""

    def __init__(self) -> None:
        self._relative_error: float | None = None
        self._counts: dict[int, int] = {}
        self._zero_count = 0
        self._total = 0.0

    def add(self, sketch: QuantileSketch) -> None:
        """SketchMismatchError if its resolution is not that of the others."""
        if not sketch.counts and not sketch.zero_count:
            return
        if self._relative_error != sketch.relative_error:
            if self._relative_error is not None:
                raise SketchMismatchError(
                    f"relative errors {self._relative_error} and {sketch.relative_error} do not merge"
                )
            self._relative_error = sketch.relative_error
        self._zero_count += sketch.zero_count
        self._total += sketch.total
        counts = self._counts
        held = counts.get
        for bucket, count in sketch.counts.items():
            counts[bucket] = held(bucket, 0) + count

    def value(self) -> QuantileSketch:
        """What it holds, as a view: read it before the next `add`."""
        return QuantileSketch(self._relative_error or RELATIVE_ERROR, self._counts, self._zero_count, self._total)


def _bucketed(values: Iterable[float], relative_error: float) -> Iterator[tuple[float, int | None]]:
    log_gamma = math.log((1 + relative_error) / (1 - relative_error))
    for value in values:
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"value {value} must be finite and not negative")
        yield value, math.ceil(math.log(value) / log_gamma) if value > 0 else None
