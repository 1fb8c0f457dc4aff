"""The API's backend without Ray: one engine in this process."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator

from cluster.reports import ReplicaReport
from engine.async_engine import AsyncEngine
from engine.types import GenerationRequest, ModelInfo, RequestOutput


class InProcessBackend:
    """A `cluster.ingress.backend.Backend` over one AsyncEngine."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine

    async def start(self) -> None:
        """The engine runs already."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestOutput, None]:
        return self.engine.generate(request)

    def num_replicas(self) -> int:
        return 1

    async def info(self) -> ModelInfo:
        return self.engine.info

    async def reports(self) -> list[ReplicaReport]:
        return [ReplicaReport("only", os.getpid(), self.engine.info, self.engine.stats(), self.engine.totals())]
