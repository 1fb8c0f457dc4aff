"""Admission in /metrics: what each tenant has in its queue, was given, and was refused and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from cluster.admission.fair_queue import Flow
from cluster.ingress.admission import Admission, TenantCounts

FLOW_GAUGES: dict[str, tuple[str, Callable[[Flow], float]]] = {
    "waiting_requests": ("Requests in the tenant's queue.", lambda flow: flow.num_waiting),
    "waiting_cost_tokens": ("What they will cost, in weighted tokens.", lambda flow: flow.waiting_cost),
    "running_requests": ("Requests that the engines hold for the tenant.", lambda flow: flow.num_running),
}
TENANT_COUNTERS: dict[str, tuple[str, Callable[[TenantCounts], float]]] = {
    "admitted_requests": ("Requests that were let in.", lambda counts: counts.num_admitted),
    "wait_seconds": ("Sum of their waits for a place.", lambda counts: counts.wait_s),
    "prompt_tokens": ("Prompt tokens of ended requests.", lambda counts: counts.num_prompt_tokens),
    "output_tokens": ("Answer tokens of ended requests.", lambda counts: counts.num_output_tokens),
}


def admission_metrics(admission: Admission, prefix: str, ingress_id: str) -> Iterator[Metric]:
    """Labels: the ingress process, and the tenant."""
    for name, (text, of_flow) in FLOW_GAUGES.items():
        gauge = GaugeMetricFamily(prefix + name, text, labels=("ingress", "model", "tenant"))
        for model, tenant, flow in admission.flows():
            gauge.add_metric([ingress_id, model, tenant], of_flow(flow))
        yield gauge
    capacity = GaugeMetricFamily(prefix + "places", "Requests that engines may hold.", labels=("ingress", "model"))
    for model, lane in admission.lanes.items():
        capacity.add_metric([ingress_id, model], lane.queue.capacity)
    yield capacity
    shared = GaugeMetricFamily(prefix + "rates_shared", "1 while rates go through Redis.", labels=("ingress",))
    shared.add_metric([ingress_id], admission.rates.are_shared)
    yield shared
    for name, (text, of_counts) in TENANT_COUNTERS.items():
        counter = CounterMetricFamily(prefix + name, text, labels=("ingress", "tenant"))
        for tenant, counts in admission.counts.items():
            counter.add_metric([ingress_id, tenant], of_counts(counts))
        yield counter
    refused = CounterMetricFamily(prefix + "refused_requests", "And why.", labels=("ingress", "tenant", "outcome"))
    for tenant, counts in admission.counts.items():
        for outcome, number in counts.num_refused.items():
            refused.add_metric([ingress_id, tenant, outcome.label], number)
    yield refused
