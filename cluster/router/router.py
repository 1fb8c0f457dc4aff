"""The request router of the engine deployment: least loaded by the replicas' own account, else Serve's choice.

Serve builds one in each process that holds a handle, and swallows exceptions of ``choose_replicas`` together with the
request, so nothing may escape from here and nothing may block.
"""

from __future__ import annotations

import logging
import os
import random
from typing import Any

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter  # the public API has none
from ray.serve.request_router import PendingRequest, RunningReplica

from cluster.router.policy import rank
from cluster.router.registry import LoadRegistry

logger = logging.getLogger(__name__)


class RedisRouter(PowerOfTwoChoicesRequestRouter):
    """Ranks replicas by the loads they publish in Redis; falls back to the power of two choices."""

    def initialize_state(self, redis_url: str = "", **_: Any) -> None:
        url = redis_url or os.environ.get("REDIS_URL", "")
        self._registry = LoadRegistry(url, self.app_name) if url else None
        self._failed_before = False

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas in ranks of one, best first."""
        try:
            ranks = self._choose_by_load(candidate_replicas)
        except Exception:
            ranks = None
            if not self._failed_before:
                self._failed_before = True
                logger.exception("routing by load failed; Serve's own choice is used where it fails")
        if ranks is None:
            return await super().choose_replicas(candidate_replicas, pending_request)
        if pending_request is not None:
            pending_request.routing_context.should_backoff = (
                True  # else Serve retries in a tight loop when all are full
            )
        return ranks

    def _choose_by_load(self, candidates: list[RunningReplica]) -> list[list[RunningReplica]] | None:
        if self._registry is None or not candidates:
            return None
        replica_by_id = {replica.replica_id.unique_id: replica for replica in candidates}
        self._registry.watch(tuple(replica_by_id))
        order = rank(tuple(replica_by_id), self._registry.loads(), self._registry.num_picked(), random.random)
        if order is None:
            return None
        # Counted here, not when the request was routed: by then others have chosen by the same stale loads.
        self._registry.count_pick(order[0])
        return [[replica_by_id[replica_id]] for replica_id in order]
