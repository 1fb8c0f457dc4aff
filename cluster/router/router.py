"""The router of one ingress process: it puts what the policy needs together and asks it.

The loads are a cache of Redis, and without Redis the requests that this process holds decide: a pick waits for nothing
but, in a process that has just begun, for the first loads to come, FIRST_LOADS_S at most.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b

from cluster.logs import fields
from cluster.router.policy import Demand, rank
from cluster.router.prefix_index import PrefixIndex
from cluster.router.registry import LoadRegistry
from engine.types import GenerationRequest, ServiceClass

FIRST_LOADS_S = 0.005

logger = logging.getLogger(__name__)


class Router:
    """Picks a replica for each request. All methods belong to one event loop."""

    def __init__(self, registry: LoadRegistry) -> None:
        self._registry = registry
        self._prefixes = PrefixIndex()

    def watch(self, replica_ids: Sequence[str]) -> None:
        """These are the replicas: learn their loads before a request comes."""
        self._registry.watch(replica_ids)

    async def wait_for_loads(self, replica_ids: Sequence[str]) -> None:
        """Before a pick: a process's first requests would else all be routed by its own count."""
        self._registry.watch(replica_ids)
        await self._registry.first_exchange(FIRST_LOADS_S)

    def pick(self, request: GenerationRequest, num_held: Mapping[str, int]) -> str:
        """One of the replicas in ``num_held``: those that take requests, each with the requests sent from here."""
        self._registry.watch(tuple(num_held))
        demand = Demand(
            num_prompt_tokens=len(request.prompt_ids),
            exact=request.service_class is ServiceClass.FULL,
            cached_tokens=self._prefixes.match(request.prompt_ids, request.cache_salt),
            home=home_of(request.session_id, num_held) if request.session_id else None,
        )
        order = rank(tuple(num_held), self._registry.loads(), self._registry.picked(), random.random, demand)
        if order is None:
            picked = min(num_held, key=lambda replica_id: (num_held[replica_id], random.random()))
        else:
            picked = order[0]
            cached = demand.cached_tokens.get(picked, 0)
            self._registry.count_pick(picked, max(demand.num_prompt_tokens - cached, 0))
        self._prefixes.insert(request.prompt_ids, picked, request.cache_salt)
        if logger.isEnabledFor(logging.INFO):
            choice = {"replica_id": picked, "by": "own count" if order is None else "load", "of": len(num_held)}
            logger.info("routed", extra=fields({**request.log_fields, **choice}))
        return picked

    def forget(self, replica_id: str) -> None:
        """The replica is gone."""
        self._prefixes.forget(replica_id)


def home_of(session_id: str, replica_ids: Iterable[str]) -> str:
    """The replica on which all ingress processes agree (rendezvous hashing): few sessions move when the set changes."""

    def weight(replica_id: str) -> bytes:
        return blake2b(f"{session_id}\n{replica_id}".encode(), digest_size=8).digest()

    return max(replica_ids, key=weight)
