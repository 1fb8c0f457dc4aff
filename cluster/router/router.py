"""The router of one ingress process: least loaded by the replicas' own account, else by its own.

Nothing here waits: the loads are a cache of Redis, and without Redis the requests that this process holds decide.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from cluster.router.policy import rank
from cluster.router.registry import LoadRegistry
from engine.types import GenerationRequest


class Router:
    """Picks a replica for each request. All methods belong to one event loop."""

    def __init__(self, registry: LoadRegistry) -> None:
        self._registry = registry

    def pick(self, request: GenerationRequest, num_held: Mapping[str, int]) -> str:
        """One of the replicas in ``num_held``: those that take requests, each with the requests sent from here."""
        self._registry.watch(tuple(num_held))
        order = rank(tuple(num_held), self._registry.loads(), self._registry.num_picked(), random.random)
        if order is None:
            return min(num_held, key=lambda replica_id: (num_held[replica_id], random.random()))
        self._registry.count_pick(order[0])
        return order[0]
