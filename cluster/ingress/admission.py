"""Between the door and the engines, for one ingress process: rates, each tenant's queue, shedding. The shell around
`cluster.admission`.

A request enters at the door before it is read, is admitted when it has been, and ends; each is accounted for once.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.admission.buckets import RateKind, Rates
from cluster.admission.config import AdmissionSection
from cluster.admission.estimates import OutputLength
from cluster.admission.fair_queue import FairQueue, Flow, Ticket, capacity, cost_of
from cluster.admission.promises import PromiseReader
from cluster.admission.rates import RateAnswer, TenantRates
from cluster.admission.shedding import Drain, judge
from cluster.admission.tenants import Tenant, TenantLimits
from cluster.ingress.errors import DEFAULT_RETRY_AFTER_S, ApiError, Outcome
from cluster.ingress.rate_headers import rate_headers
from engine.types import GenerationRequest

MAX_RETRY_AFTER_S = 60.0  # longer waits are not worth predicting; the openai client heeds no more either


@dataclass(slots=True)
class Lane:
    """One model's queue. ``num_places`` asks how many requests its engines may hold from here."""

    slo_ttft_s: float
    queue: FairQueue = field(default_factory=lambda: FairQueue(1))
    drains: dict[str, Drain] = field(default_factory=dict)  # by tenant
    turns: dict[Ticket, asyncio.Future[None]] = field(default_factory=dict)
    num_places: Callable[[], int] = lambda: 1

    def drain(self, tenant: str) -> Drain:
        return self.drains.get(tenant, Drain())


@dataclass(slots=True)
class Permit:
    """A request in the engines. ``own_s``: of its wait, what its tenant's own limit caused."""

    tenant: Tenant
    lane: Lane
    ticket: Ticket
    rates: Rates
    num_taken: float  # tokens, of the rate
    headers: dict[str, str]

    @property
    def own_s(self) -> float:
        return self.ticket.own_s


@dataclass(slots=True)
class TenantCounts:
    """For /metrics."""

    num_held: int = 0
    num_admitted: int = 0
    wait_s: float = 0.0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_refused: Counter[Outcome] = field(default_factory=Counter)


class Admission:
    """``slo_ttft_s``: model |-> its SLO; ``promises`` None: nobody tells what the engines are up to."""

    def __init__(
        self,
        section: AdmissionSection,
        num_ingress: int,
        slo_ttft_s: Mapping[str, float],
        rates: TenantRates,
        promises: PromiseReader | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._section = section
        self._num_ingress = num_ingress
        self.lanes = {model: Lane(slo_s) for model, slo_s in slo_ttft_s.items()}
        self.rates = rates
        self._promises = promises
        self._draw = draw
        self._lengths: dict[str, OutputLength] = {}
        self.counts: dict[str, TenantCounts] = {}

    def enter(self, tenant: Tenant) -> None:
        """Before the request is read: `leave` must follow. Raises ApiError (429)."""
        self.rates.start()
        counts = self.counts.setdefault(tenant.name, TenantCounts())
        limits = tenant.limits
        cap = self._cap(limits)
        lanes = [lane for model, lane in self.lanes.items() if limits.may_use(model)]  # which one is not known yet
        if cap is not None and counts.num_held >= len(lanes) * (cap + limits.max_queued):
            message = f"{counts.num_held} requests of this tenant are served or wait already"
            raise self._refuse(tenant, Outcome.QUEUE_FULL, message, _drain_s(tenant, lanes))
        early = self.rates.early_refusal(tenant.name) if limits.requests_per_minute is not None else None
        if early is not None:
            raise self._rate_refusal(tenant, early)
        counts.num_held += 1

    def leave(self, tenant: Tenant) -> None:
        self.counts[tenant.name].num_held -= 1

    async def take_rate(self, tenant: Tenant, num_tokens: float = 0.0) -> dict[str, str]:
        """Count one request and its tokens against the tenant's rates; the headers to answer with. Raises ApiError."""
        rates = rates_of(tenant.limits)
        if not rates.limited:
            return {}
        answer = await self.rates.take(tenant.name, rates, num_tokens)
        if answer.short is not None:
            raise self._rate_refusal(tenant, answer)
        return rate_headers(rates, answer.levels)

    async def admit(
        self,
        tenant: Tenant,
        model: str,
        num_places: Callable[[], int],
        max_num_seqs: int,
        requests: Sequence[GenerationRequest],
        num_choices_per_prompt: int,
        arrived_s: float,
        max_wait_s: float | None = None,
    ) -> Permit:
        """Wait for a place in the model's engines. Raises ApiError: 422, 429 or 503."""
        lane, limits, now_s = self.lanes[model], tenant.limits, time.monotonic()
        lane.num_places = lambda: capacity(num_places(), max_num_seqs, self._section.in_flight_frac, self._num_ingress)
        flow = lane.queue.flow(tenant.name, limits.weight, self._cap(limits))
        target_s = limits.ttft_s or lane.slo_ttft_s
        self._check_promise(tenant, model, lane, flow, target_s)
        num_prompt = sum(len(request.prompt_ids) for request in requests[::num_choices_per_prompt])
        length = self._lengths.get(tenant.name, OutputLength())
        num_output = sum(length.expect(request.sampling.max_tokens) for request in requests)
        num_taken = self._tokens_to_take(tenant, num_prompt, num_output)
        headers = await self.take_rate(tenant, num_taken)
        ticket = Ticket(
            tenant.name,
            cost_of(num_prompt, num_output),
            deadline_s=arrived_s + min(target_s, max_wait_s or math.inf),
            priority=requests[0].priority,
            num_places=len(requests),
        )
        permit = Permit(tenant, lane, ticket, rates_of(limits), num_taken, headers)
        try:
            await self._wait(tenant, lane, flow, ticket, min(self._section.max_wait_s, max_wait_s or math.inf))
        except BaseException:
            self._settle(permit, 0)
            raise
        counts = self.counts[tenant.name]
        counts.num_admitted += 1
        counts.wait_s += time.monotonic() - now_s
        return permit

    def end(self, permit: Permit, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """It has left the engines, having used so many tokens."""
        name = permit.tenant.name
        counts = self.counts[name]
        counts.num_prompt_tokens += num_prompt_tokens
        counts.num_output_tokens += num_output_tokens
        if num_output_tokens:
            length = self._lengths.get(name, OutputLength())
            self._lengths[name] = length.observe(num_output_tokens / permit.ticket.num_places)
        self._settle(permit, num_prompt_tokens + num_output_tokens)
        permit.lane.queue.finish(permit.ticket, cost_of(num_prompt_tokens, num_output_tokens), time.monotonic())
        self._pump(permit.lane)

    def flows(self) -> Iterator[tuple[str, str, Flow]]:
        """(model, tenant, flow) of all queues."""
        for model, lane in self.lanes.items():
            for tenant, flow in lane.queue.flows():
                yield model, tenant, flow

    def _check_promise(self, tenant: Tenant, model: str, lane: Lane, flow: Flow, target_s: float) -> None:
        """Shed, perhaps, when the tenant's queue cannot be served in time. Raises ApiError (503)."""
        if not self._section.shed or not flow.num_waiting or flow.is_capped:
            return
        engines = None
        if self._promises is not None:
            self._promises.start()
            engines = self._promises.promise(model)
        decision = judge(engines, flow.waiting_cost, lane.drain(tenant.name), target_s, self._section.max_wait_s)
        if decision is not None and self._draw() < decision.shed_frac:
            message = f"the first token would come later than after {target_s:g} s ({decision.reason})"
            raise self._refuse(tenant, Outcome.SHED, message, decision.retry_after_s)

    def _tokens_to_take(self, tenant: Tenant, num_prompt: int, num_output: float) -> float:
        """Of the rate; never more than a full bucket holds. Raises ApiError when the prompt alone is more."""
        budget = tenant.limits.tokens_per_minute
        if budget is None:
            return 0.0
        if num_prompt > budget:
            message = f"the prompt has {num_prompt} tokens; this tenant's budget holds {budget} (tokens per minute)"
            raise self._refuse(tenant, Outcome.OVER_BUDGET, message, None)
        return min(num_prompt + num_output, float(budget))

    async def _wait(self, tenant: Tenant, lane: Lane, flow: Flow, ticket: Ticket, max_wait_s: float) -> None:
        lane.queue.push(ticket, time.monotonic())
        self._pump(lane, ticket)
        if ticket.started:
            return
        if flow.num_waiting > tenant.limits.max_queued:
            lane.queue.remove(ticket, time.monotonic())
            message = f"{flow.num_waiting} requests of this tenant wait for the model already"
            raise self._refuse(tenant, Outcome.QUEUE_FULL, message, _drain_s(tenant, [lane]))
        turn = lane.turns[ticket] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(max_wait_s):
                await turn
        except BaseException as error:
            lane.turns.pop(ticket, None)
            if ticket.started:  # its turn came in the same moment
                lane.queue.finish(ticket, 0.0, time.monotonic())
            else:
                lane.queue.remove(ticket, time.monotonic())
            self._pump(lane)
            if isinstance(error, TimeoutError):
                message = f"no place became free within {max_wait_s:g} s"
                raise self._refuse(tenant, Outcome.QUEUE_TIMEOUT, message, _drain_s(tenant, [lane])) from error
            raise

    def _pump(self, lane: Lane, arrived: Ticket | None = None) -> None:
        """Let in whoever may go, and note what that says of the drain rates."""
        queue, now_s = lane.queue, time.monotonic()
        queue.capacity = lane.num_places()
        while (ticket := queue.pop(now_s)) is not None:
            has_queue = queue.flow_of(ticket.tenant).num_waiting > 0
            lane.drains[ticket.tenant] = lane.drain(ticket.tenant).note(ticket.cost, has_queue, now_s)
            turn = lane.turns.pop(ticket, None)
            if turn is not None and not turn.done():
                turn.set_result(None)
        if arrived is not None and not arrived.started:
            lane.drains[arrived.tenant] = lane.drain(arrived.tenant).note(0.0, True, now_s)

    def _settle(self, permit: Permit, num_used: float) -> None:
        if permit.rates.tokens is not None:
            self.rates.settle(permit.tenant.name, permit.rates, num_used - permit.num_taken)

    def _cap(self, limits: TenantLimits) -> int | None:
        """This process's part of the tenant's ``max_concurrent``."""
        return None if limits.max_concurrent is None else max(1, math.ceil(limits.max_concurrent / self._num_ingress))

    def _rate_refusal(self, tenant: Tenant, answer: RateAnswer) -> ApiError:
        rates = rates_of(tenant.limits)
        by_requests = answer.short is RateKind.REQUESTS
        limit = rates.requests if by_requests else rates.tokens
        message = (
            f"the limit of {limit:g} {answer.short} per minute is reached; try again in {answer.retry_after_s:.1f} s"
        )
        outcome = Outcome.RATE_REQUESTS if by_requests else Outcome.RATE_TOKENS
        return self._refuse(tenant, outcome, message, answer.retry_after_s, rate_headers(rates, answer.levels))

    def _refuse(
        self,
        tenant: Tenant,
        outcome: Outcome,
        message: str,
        retry_after_s: float | None,
        headers: Mapping[str, str] | None = None,
    ) -> ApiError:
        self.counts.setdefault(tenant.name, TenantCounts()).num_refused[outcome] += 1
        if retry_after_s is not None:
            retry_after_s = min(retry_after_s, MAX_RETRY_AFTER_S)
        return ApiError(outcome, message, retry_after_s=retry_after_s, more_headers=headers)


def _drain_s(tenant: Tenant, lanes: Sequence[Lane]) -> float:
    """Until the tenant's queues have drained as they do now."""
    waits = [lane.drain(tenant.name).wait_s(lane.queue.cost_ahead(tenant.name)) for lane in lanes]
    return max((wait_s for wait_s in waits if wait_s), default=DEFAULT_RETRY_AFTER_S)


def rates_of(limits: TenantLimits) -> Rates:
    return Rates(limits.requests_per_minute, limits.tokens_per_minute)
