"""Who goes to the engines next: fair between tenants, by deadline within one. Pure: no clock, no asyncio.

Each tenant has a queue of its own and a counter of the tokens it was served, divided by its weight; of the tenants that
wait, the one with the least counter goes next (the Virtual Token Counter, arXiv 2401.00588). A tenant that begins to
wait starts at the least counter of those that do: nobody saves up service while away. What a request will cost is
estimated when it starts and put right when it has ended.

| tenants                                   | next                                                              |
|-------------------------------------------|-------------------------------------------------------------------|
| the engines hold ``capacity`` requests    | nobody                                                            |
| one has ``max_concurrent`` in the engines | not that one; its wait then is its own doing (`Ticket.own_s`)     |
| several wait                              | the one least served for its weight                               |
| within one                                | least priority, then earliest deadline, then first come           |
| its next asks for more places than free   | nobody else either, or a large request would starve               |
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

INPUT_COST, OUTPUT_COST = 1.0, 2.0  # of a token, as in arXiv 2401.00588 section 4.1


def cost_of(num_prompt_tokens: float, num_output_tokens: float) -> float:
    return INPUT_COST * num_prompt_tokens + OUTPUT_COST * num_output_tokens


@dataclass(slots=True, eq=False)
class Ticket:
    """A request's place in the queue. ``num_places``: sequences it takes in the engines (its choices)."""

    tenant: str
    cost: float
    deadline_s: float
    priority: int = 0
    num_places: int = 1
    own_s: float = 0.0  # of its wait, what its tenant's own limit caused; known once it starts
    capped_before_s: float = 0.0
    started: bool = False
    gone: bool = False  # left before its turn


@dataclass(slots=True)
class Flow:
    """One tenant. Its capped time grows while requests of it wait only because of its own limit."""

    weight: float = 1.0
    max_concurrent: int | None = None
    served: float = 0.0
    num_running: int = 0  # places
    num_waiting: int = 0  # tickets
    waiting_cost: float = 0.0
    heap: list[tuple[int, float, int, Ticket]] = field(default_factory=list)
    capped_s: float = 0.0
    capped_since_s: float | None = None

    def head(self) -> Ticket | None:
        while self.heap and self.heap[0][-1].gone:
            heapq.heappop(self.heap)
        return self.heap[0][-1] if self.heap else None

    @property
    def is_capped(self) -> bool:
        """Whether its next request waits for its own limit; one larger than the limit may go alone."""
        head = self.head()
        if head is None or self.max_concurrent is None or self.num_running == 0:
            return False
        return self.num_running + head.num_places > self.max_concurrent

    def note(self, now_s: float) -> None:
        """Account for the time since the last note; call when anything has changed."""
        if self.capped_since_s is not None:
            self.capped_s += max(0.0, now_s - self.capped_since_s)
        self.capped_since_s = now_s if self.is_capped else None


class FairQueue:
    """In front of one model's engines, which hold at most ``capacity`` requests from here; change it as they do."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_running = 0  # places
        self._flows: dict[str, Flow] = {}
        self._waiting: dict[str, Flow] = {}  # those with requests that wait
        self._order = itertools.count()
        self._virtual = 0.0  # counter of whoever was served last

    def flow(self, tenant: str, weight: float = 1.0, max_concurrent: int | None = None) -> Flow:
        """The tenant's; its limits are those given last."""
        flow = self._flows.setdefault(tenant, Flow())
        flow.weight, flow.max_concurrent = weight, max_concurrent
        return flow

    def flow_of(self, tenant: str) -> Flow:
        return self._flows[tenant]

    def flows(self) -> Iterator[tuple[str, Flow]]:
        yield from self._flows.items()

    def push(self, ticket: Ticket, now_s: float) -> None:
        """Its tenant's `flow` must have been named before."""
        flow = self._flows[ticket.tenant]
        if not flow.num_waiting:
            least = min((other.served for other in self._waiting.values()), default=self._virtual)
            flow.served = max(flow.served, least)
            self._waiting[ticket.tenant] = flow
        flow.note(now_s)
        ticket.capped_before_s = flow.capped_s
        heapq.heappush(flow.heap, (ticket.priority, ticket.deadline_s, next(self._order), ticket))
        flow.num_waiting += 1
        flow.waiting_cost += ticket.cost
        flow.note(now_s)

    def pop(self, now_s: float) -> Ticket | None:
        """The next request to send to the engines, charged to its tenant; None: nobody may go now."""
        best: Flow | None = None
        for flow in self._waiting.values():
            if not flow.is_capped and (best is None or flow.served < best.served):
                best = flow
        ticket = best.head() if best is not None else None
        if best is None or ticket is None:
            return None
        if self.num_running and self.num_running + ticket.num_places > self.capacity:
            return None
        best.note(now_s)
        heapq.heappop(best.heap)
        self._leave(best, ticket)
        ticket.started = True
        ticket.own_s = best.capped_s - ticket.capped_before_s
        self._virtual = best.served
        best.served += ticket.cost / best.weight
        best.num_running += ticket.num_places
        self.num_running += ticket.num_places
        best.note(now_s)
        return ticket

    def remove(self, ticket: Ticket, now_s: float) -> None:
        """It gives up waiting."""
        flow = self._flows[ticket.tenant]
        ticket.gone = True
        self._leave(flow, ticket)
        flow.note(now_s)

    def finish(self, ticket: Ticket, used: float, now_s: float) -> None:
        """It has left the engines, having cost ``used``."""
        flow = self._flows[ticket.tenant]
        flow.served = max(0.0, flow.served + (used - ticket.cost) / flow.weight)
        flow.num_running -= ticket.num_places
        self.num_running -= ticket.num_places
        flow.note(now_s)

    def cost_ahead(self, tenant: str) -> float:
        """Of the requests of the tenant that wait already."""
        return self._flows[tenant].waiting_cost if tenant in self._flows else 0.0

    def _leave(self, flow: Flow, ticket: Ticket) -> None:
        flow.num_waiting -= 1
        flow.waiting_cost -= ticket.cost
        if not flow.num_waiting:
            flow.waiting_cost = 0.0
            del self._waiting[ticket.tenant]


def capacity(num_replicas: int, max_num_seqs: int, in_flight_frac: float, num_ingress: int) -> int:
    """How many requests one of ``num_ingress`` processes may have in the engines."""
    return max(1, math.ceil(max(num_replicas, 1) * max_num_seqs * in_flight_frac / num_ingress))
