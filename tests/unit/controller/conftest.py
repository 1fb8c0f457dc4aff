"""A real private Redis for the tests of what the controller persists."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster.local.redis_server import RedisServer


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server
