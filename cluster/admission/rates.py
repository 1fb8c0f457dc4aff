"""The rates of tenants in one ingress process: shared through Redis, else this process's part of them.

What Redis last said is kept as this process's own part, and what was granted without Redis is told to it afterwards:
going from one to the other gives a tenant no second minute's worth. A tenant that was just refused for its number of
requests is refused at the door until it can pass.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from cluster.admission.buckets import Grant, Levels, RateKind, Rates, full, refill, take, wait_s
from cluster.admission.shared import Missed, SharedBuckets


@dataclass(slots=True)
class _Account:
    levels: Levels  # this process's part
    at_s: float
    untold_requests: float = 0.0  # granted or settled while Redis was away
    untold_tokens: float = 0.0
    refused: RateKind | None = None
    refused_until_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RateAnswer:
    """``short`` None: granted. Levels are the tenant's, over all ingress processes as far as is known."""

    levels: Levels
    short: RateKind | None = None
    retry_after_s: float = 0.0


class TenantRates:
    """``num_ingress`` processes share the rates; ``shared`` None: without Redis."""

    def __init__(self, shared: SharedBuckets | None, num_ingress: int) -> None:
        self._shared = shared
        self._num_ingress = num_ingress
        self._accounts: dict[str, _Account] = {}

    @property
    def are_shared(self) -> bool:
        return self._shared is not None and self._shared.reachable

    def start(self) -> None:
        """Begin to share the rates; later calls do nothing."""
        if self._shared is not None:
            self._shared.start()

    def early_refusal(self, tenant: str) -> RateAnswer | None:
        """A refusal that is known before a request has been read: its bucket of requests is still empty."""
        account = self._accounts.get(tenant)
        now_s = time.monotonic()
        if account is None or account.refused is None or now_s >= account.refused_until_s:
            return None
        whole = Levels(account.levels.requests * self._num_ingress, account.levels.tokens * self._num_ingress)
        return RateAnswer(whole, account.refused, account.refused_until_s - now_s)

    async def take(self, tenant: str, rates: Rates, num_tokens: float) -> RateAnswer:
        """Take one request and its estimated tokens."""
        if self.are_shared:
            self._tell(tenant, rates)
        answer = await self._shared.take(tenant, rates, 1, num_tokens) if self._shared else Missed.AWAY
        account = self._account(tenant, rates)
        if isinstance(answer, Grant):
            grant, levels = answer, answer.levels
            account.levels = Levels(levels.requests / self._num_ingress, levels.tokens / self._num_ingress)
            retry_after_s = wait_s(levels, rates, 1, num_tokens)
        else:
            part = rates.shared_by(self._num_ingress)
            # A part may be less than one request, or than a large one: who finds it full may pass and owes the rest.
            wanted = (min(1.0, part.requests or 1.0), min(num_tokens, part.tokens or num_tokens))
            grant = take(account.levels, part, *wanted)
            if grant.short is None:
                grant = take(account.levels, part, 1, num_tokens, force=True)
                if answer is Missed.AWAY:
                    account.untold_requests += 1
                    account.untold_tokens += num_tokens
            account.levels = grant.levels
            retry_after_s = wait_s(account.levels, part, *wanted)
            levels = Levels(grant.levels.requests * self._num_ingress, grant.levels.tokens * self._num_ingress)
        if grant.short is None:
            account.refused = None
            return RateAnswer(levels)
        if grant.short is RateKind.REQUESTS:  # a smaller request may still find tokens enough
            account.refused, account.refused_until_s = grant.short, time.monotonic() + retry_after_s
        return RateAnswer(levels, grant.short, retry_after_s)

    def settle(self, tenant: str, rates: Rates, num_tokens: float) -> None:
        """A request used so many tokens more (negative: less) than was taken for it."""
        account = self._account(tenant, rates)
        part = rates.shared_by(self._num_ingress)
        if self._shared is not None and self._shared.reachable:
            self._shared.settle(tenant, rates, 0, num_tokens)
            num_tokens /= self._num_ingress
        else:
            account.untold_tokens += num_tokens
        account.levels = take(account.levels, part, 0, num_tokens, force=True).levels

    def _tell(self, tenant: str, rates: Rates) -> None:
        """What was granted without Redis, but for what has flowed in again since."""
        account, part = self._account(tenant, rates), rates.shared_by(self._num_ingress)
        if self._shared is not None and (account.untold_requests or account.untold_tokens):
            num_requests = min(account.untold_requests, (part.requests or 0.0) - account.levels.requests)
            num_tokens = min(account.untold_tokens, (part.tokens or 0.0) - account.levels.tokens)
            self._shared.settle(tenant, rates, num_requests, num_tokens)
            account.untold_requests = account.untold_tokens = 0.0

    def _account(self, tenant: str, rates: Rates) -> _Account:
        """This process's part, as of now."""
        part, now_s = rates.shared_by(self._num_ingress), time.monotonic()
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = _Account(full(part), now_s)
        account.levels = refill(account.levels, part, now_s - account.at_s)
        account.at_s = now_s
        return account
