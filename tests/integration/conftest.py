"""A control plane of real processes and sockets for each test that asks for one; engines that may be slow."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from cluster.local.redis_server import RedisServer
from tests.integration.control_harness import Cluster, make_patient


@pytest.fixture(scope="module", autouse=True)
def patient_with_engines() -> Iterator[None]:
    """An engine thread that gets no time for a few seconds is not wedged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.async_engine.STALLED_S", 600.0)
        yield


@pytest.fixture
async def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    make_patient(monkeypatch)
    with RedisServer(tmp_path) as redis:
        cluster = Cluster(redis)
        yield cluster
        await cluster.stop()
