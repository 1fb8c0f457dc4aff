"""Super experts: the few whose answers are so large that the model breaks without them; no dimmer may touch them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

PERCENTILE = 0.995  # Super Experts, arXiv 2507.23279
MIN_SHARE_OF_MAX = 0.1  # the same
MIN_TIMES_MEDIAN = 10.0  # so that a model without super experts protects nothing


def super_experts(output_peak: Mapping[int, Sequence[float]]) -> tuple[tuple[int, int], ...]:
    """(layer, expert) pairs that stand out by the largest absolute down_proj output. ``output_peak``: by layer.

    Both limits of the paper must hold, above the 99.5th percentile and a tenth of the largest, and ten times the
    median.
    """
    peaks = sorted(peak for layer in output_peak.values() for peak in layer)
    if not peaks:
        return ()
    limit = max(
        peaks[min(len(peaks) - 1, int(PERCENTILE * len(peaks)))],
        MIN_SHARE_OF_MAX * peaks[-1],
        MIN_TIMES_MEDIAN * median(peaks),
    )
    return tuple(
        (layer, expert)
        for layer, of_layer in sorted(output_peak.items())
        for expert, peak in enumerate(of_layer)
        if peak >= limit
    )
