"""A short soak: everything that goes wrong in ten minutes, in a third of one."""

from __future__ import annotations

import pytest

from benchmarks.soak.run import run

pytestmark = pytest.mark.cluster


def test_nothing_hangs_or_leaks() -> None:
    figures = run(duration_s=20.0, seed=1, num_kills=1)
    assert figures["replicas_killed"] >= 1
    assert figures["redis_restarts"] == 2
    assert figures["hung"] == 0
    assert figures["leaked"] == 0, figures["leaks_by_kind"]
    assert not figures["unexpected"]
    assert {"ok", "abandoned", "refused"} <= set(figures["outcomes"])
