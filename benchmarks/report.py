"""From request records to the figures of a report.

Definitions, the same for every run:

* Latencies are the client's and count from a request's scheduled arrival, so every queue is in them.
* A failed request violates the SLO. It has no latency: quantiles are over completed requests, ``failed`` stands beside.
* Quantiles are nearest-rank: always a latency that some request had.
* ``violation_s`` counts the one-second bins of arrival time in which the p90 TTFT or the p90 TPOT of the requests that
  arrived in that second exceeds its objective. A failed request counts there as infinitely slow; a second without
  arrivals is no violation.
* Rates are over ``duration_s``: from the run's start to its last token, at least the time of offering requests.
* ``level_mean`` weighs each request's mean level by the tokens computed for it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.loadgen.record import RequestRecord


@dataclass(frozen=True, slots=True)
class Slo:
    """The promise: time to first token, queue included, and mean time per later token."""

    ttft_s: float
    tpot_s: float

    def met_by(self, record: RequestRecord) -> bool:
        return record.ttft_s <= self.ttft_s and record.tpot_s <= self.tpot_s


@dataclass(frozen=True, slots=True)
class RunMetrics:
    """One run's figures; None where there is nothing to measure."""

    requests: int
    failed: int
    outcomes: dict[str, int]
    slo_attainment: float  # share of all requests that met both objectives
    violation_s: int
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p90_s: float | None
    tpot_p99_s: float | None
    goodput_tok_s: float  # completion tokens of requests that met the SLO
    tok_s: float  # completion tokens
    level_mean: float
    level_peak: int
    dimmed_share: float  # of the routed (token, expert) pairs
    duration_s: float
    send_delay_max_s: float  # how late the load generator itself was at worst


@dataclass(frozen=True, slots=True)
class SecondStats:
    """Requests that were due in ``[second, second + 1)``; infinite where the slow tenth failed."""

    second: int
    num_arrivals: int
    ttft_p90_s: float
    tpot_p90_s: float

    def violates(self, slo: Slo) -> bool:
        return self.ttft_p90_s > slo.ttft_s or self.tpot_p90_s > slo.tpot_s


def nearest_rank(values: Iterable[float], percent: int) -> float:
    """The least of ``values`` (at least one) that at least ``percent`` % of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def percentile(values: Sequence[float], percent: int) -> float | None:
    return nearest_rank(values, percent) if values else None


def by_second(records: Sequence[RequestRecord]) -> list[SecondStats]:
    """Seconds of arrival time that had arrivals, ascending."""
    bins: dict[int, list[RequestRecord]] = defaultdict(list)
    for record in records:
        bins[int(record.scheduled_s)].append(record)
    return [
        SecondStats(
            second=second,
            num_arrivals=len(members),
            ttft_p90_s=nearest_rank((r.ttft_s for r in members), 90),
            tpot_p90_s=nearest_rank((r.tpot_s for r in members), 90),
        )
        for second, members in sorted(bins.items())
    ]


def measure(records: Sequence[RequestRecord], slo: Slo, offered_s: float) -> RunMetrics:
    """Figures of one run whose requests were offered over ``offered_s`` seconds."""
    completed = [r for r in records if r.completed]
    good = [r for r in completed if slo.met_by(r)]
    duration_s = max([offered_s, *(r.last_token_s for r in records if r.last_token_s is not None)])
    ttfts_s = [r.ttft_s for r in completed]
    tpots_s = [r.tpot_s for r in completed if r.num_tokens > 1]
    level_mean, level_peak, dimmed_share = _brownout(completed)
    return RunMetrics(
        requests=len(records),
        failed=len(records) - len(completed),
        outcomes=dict(Counter(r.outcome.value for r in records)),
        slo_attainment=len(good) / len(records) if records else 0.0,
        violation_s=sum(second.violates(slo) for second in by_second(records)),
        ttft_p50_s=percentile(ttfts_s, 50),
        ttft_p90_s=percentile(ttfts_s, 90),
        ttft_p99_s=percentile(ttfts_s, 99),
        tpot_p50_s=percentile(tpots_s, 50),
        tpot_p90_s=percentile(tpots_s, 90),
        tpot_p99_s=percentile(tpots_s, 99),
        goodput_tok_s=sum(r.num_tokens for r in good) / duration_s,
        tok_s=sum(r.num_tokens for r in completed) / duration_s,
        level_mean=level_mean,
        level_peak=level_peak,
        dimmed_share=dimmed_share,
        duration_s=duration_s,
        send_delay_max_s=max((r.sent_s - r.scheduled_s for r in records), default=0.0),
    )


def _brownout(records: Sequence[RequestRecord]) -> tuple[float, int, float]:
    """``(level_mean, level_peak, dimmed_share)`` over the records that carry brownout usage."""
    used = [(r.num_prompt_tokens + r.num_tokens, r.brownout) for r in records if r.brownout is not None]
    num_tokens = sum(n for n, _ in used)
    routed_pairs = sum(b.routed_pairs for _, b in used)
    return (
        sum(n * b.level_mean for n, b in used) / num_tokens if num_tokens else 0.0,
        max((b.level_peak for _, b in used), default=0),
        sum(b.dimmed_pairs for _, b in used) / routed_pairs if routed_pairs else 0.0,
    )
