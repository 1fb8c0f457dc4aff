"""Joining a cluster that is not there ends in one sentence, and soon."""

from __future__ import annotations

import pytest

from cluster.driver import connect
from cluster.errors import ClusterError
from cluster.local.processes import free_ports


def test_nobody_listens() -> None:
    (port,) = free_ports(1, "127.0.0.1")
    with pytest.raises(ClusterError, match=f"127.0.0.1:{port} does not answer"):
        connect(f"127.0.0.1:{port}")
