"""The /metrics page: every replica's gauges and counters, and this ingress's own, in Prometheus' text format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.ingress.admission import Admission
from cluster.ingress.admission_metrics import admission_metrics
from cluster.ingress.errors import Outcome
from cluster.reports import ReplicaReport
from engine.types import Phase

PREFIX = "brownoutserve_"

# name |-> (help, value of a replica's report)
GAUGES: dict[str, tuple[str, Callable[[ReplicaReport], float]]] = {
    "running_requests": ("Requests in the batch.", lambda r: r.stats.num_running),
    "waiting_requests": ("Requests in the queue.", lambda r: r.stats.num_waiting),
    "queued_prefill_tokens": ("Prompt tokens not computed yet.", lambda r: r.stats.queued_prefill_tokens),
    "oldest_wait_seconds": ("Age of the oldest request without a token.", lambda r: r.stats.oldest_wait_s),
    "kv_blocks": ("KV blocks of the pool.", lambda r: r.info.num_blocks),
    "kv_free_blocks": ("KV blocks that can be taken.", lambda r: r.stats.num_free_blocks),
    "kv_used_blocks": ("KV blocks held by requests.", lambda r: r.info.num_blocks - 1 - r.stats.num_free_blocks),
    "kv_used_fraction": ("Share of the KV blocks held by requests.", lambda r: r.stats.kv_used_frac),
    "predicted_step_seconds": ("The governor's prediction at the current levels.", lambda r: r.stats.predicted_step_s),
    "setting_version": ("Version of the setting in force.", lambda r: r.stats.setting_version),
    "lease_expired": ("1 while the replica runs on its safe policy.", lambda r: r.stats.lease_expired),
    "levels": ("Length of the ladder, level 0 included.", lambda r: r.info.num_levels),
}
COUNTERS: dict[str, tuple[str, Callable[[ReplicaReport], float]]] = {
    "predicted_steps": ("Steps whose time had been predicted.", lambda r: r.totals.predicted_steps),
    "prediction_error_seconds": (
        "Sum of |measured - predicted| step time over them.",
        lambda r: r.totals.prediction_error_s,
    ),
    "loss_nats": ("Sum of the quality loss of the level over computed tokens.", lambda r: r.totals.loss_nats),
    "steps": ("Engine steps.", lambda r: r.totals.num_steps),
    "step_seconds": ("Time spent in engine steps.", lambda r: r.totals.step_time_s),
    "preemptions": ("Requests preempted.", lambda r: r.totals.num_preemptions),
    "routed_pairs": ("(token, expert) pairs that the gates chose.", lambda r: r.totals.routed_pairs),
    "dimmed_pairs": ("Of these, served by a united expert.", lambda r: r.totals.dimmed_pairs),
    "first_tokens": ("Requests that got their first token.", lambda r: r.totals.num_first_tokens),
    "ttft_seconds": ("Sum of times to the first token.", lambda r: r.totals.ttft_s),
    "queue_wait_seconds": ("Sum of waits before the first step.", lambda r: r.totals.queue_wait_s),
    "ttft_ok": ("First tokens within the objective.", lambda r: r.totals.num_ttft_ok),
    "tpot_ok": ("Finished requests within the TPOT objective.", lambda r: r.totals.num_tpot_ok),
}


MAX_FIELD_NAMES = 100  # unknown fields told apart; clients choose the names
OTHER_FIELDS = "other"


class RequestCounter:
    """Requests of one ingress replica by endpoint and outcome, and the fields in them that nobody reads."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, Outcome]] = Counter()
        self.num_unknown_fields: Counter[tuple[str, str]] = Counter()  # (endpoint, field) |-> requests that had it

    def count_unknown_fields(self, endpoint: str, names: Sequence[str]) -> None:
        for name in names:
            known = (endpoint, name) in self.num_unknown_fields or len(self.num_unknown_fields) < MAX_FIELD_NAMES
            self.num_unknown_fields[endpoint, name if known else OTHER_FIELDS] += 1

    def count(self, endpoint: str, outcome: Outcome) -> None:
        self._counts[endpoint, outcome] += 1

    def items(self) -> list[tuple[str, Outcome, int]]:
        return [(endpoint, outcome, count) for (endpoint, outcome), count in sorted(self._counts.items(), key=str)]


def render(
    reports: Sequence[ReplicaReport],
    requests: RequestCounter,
    num_held: int,
    ingress_id: str,
    admission: Admission | None = None,
) -> bytes:
    """``num_held``: API requests that this ingress serves now."""
    registry = CollectorRegistry(auto_describe=False)
    metrics = [*_replica_metrics(reports), *_ingress_metrics(requests, num_held, ingress_id)]
    if admission is not None:
        metrics += admission_metrics(admission, PREFIX + "admission_", ingress_id)
    registry.register(_Page(metrics))
    return generate_latest(registry)


class _Page(Collector):
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def _replica_metrics(reports: Sequence[ReplicaReport]) -> Iterable[Metric]:
    replicas = GaugeMetricFamily(PREFIX + "replicas", "Engine replicas that answer.", value=len(reports))
    yield replicas
    for name, (text, value) in GAUGES.items():
        gauge = GaugeMetricFamily(PREFIX + name, text, labels=("model", "replica"))
        for report in reports:
            gauge.add_metric(_labels(report), float(value(report)))
        yield gauge
    for name, (text, value) in COUNTERS.items():
        counter = CounterMetricFamily(PREFIX + name, text, labels=("model", "replica"))
        for report in reports:
            counter.add_metric(_labels(report), float(value(report)))
        yield counter
    yield _levels(reports)
    yield _tokens(reports)
    yield _replica_requests(reports)


def _levels(reports: Sequence[ReplicaReport]) -> Metric:
    gauge = GaugeMetricFamily(
        PREFIX + "level", "Brownout level of the newest step.", labels=("model", "replica", "phase")
    )
    for report in reports:
        for phase in Phase:
            gauge.add_metric([*_labels(report), phase.name.lower()], report.stats.levels.of(phase))
    return gauge


def _tokens(reports: Sequence[ReplicaReport]) -> Metric:
    counter = CounterMetricFamily(PREFIX + "tokens", "Tokens computed.", labels=("model", "replica", "phase"))
    for report in reports:
        counter.add_metric([*_labels(report), "prefill"], report.totals.prefill_tokens)
        counter.add_metric([*_labels(report), "decode"], report.totals.decode_tokens)
    return counter


def _replica_requests(reports: Sequence[ReplicaReport]) -> Metric:
    counter = CounterMetricFamily(
        PREFIX + "engine_requests", "Requests that ended in the engine.", labels=("model", "replica", "outcome")
    )
    for report in reports:
        counter.add_metric([*_labels(report), "finished"], report.totals.num_finished)
        counter.add_metric([*_labels(report), "failed"], report.totals.num_failed)
    return counter


def _ingress_metrics(requests: RequestCounter, num_held: int, ingress_id: str) -> Iterable[Metric]:
    held = GaugeMetricFamily(PREFIX + "http_requests_held", "API requests being served.", labels=("ingress",))
    held.add_metric([ingress_id], num_held)
    yield held
    counter = CounterMetricFamily(
        PREFIX + "http_requests", "API requests by outcome.", labels=("ingress", "endpoint", "outcome")
    )
    for endpoint, outcome, count in requests.items():
        counter.add_metric([ingress_id, endpoint, outcome.label], count)
    yield counter
    unknown = CounterMetricFamily(
        PREFIX + "http_unknown_fields",
        "API requests with a field that nobody reads.",
        labels=("ingress", "endpoint", "field"),
    )
    for (endpoint, field), count in sorted(requests.num_unknown_fields.items()):
        unknown.add_metric([ingress_id, endpoint, field], count)
    yield unknown


def _labels(report: ReplicaReport) -> list[str]:
    return [report.info.name, report.replica_id]
