"""A control plane of real processes and sockets for each test that asks for one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cluster.local.redis_server import RedisServer
from tests.integration.control_harness import Cluster, make_patient


@pytest.fixture
async def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    make_patient(monkeypatch)
    with RedisServer(tmp_path) as redis:
        cluster = Cluster(redis)
        yield cluster
        await cluster.stop()
