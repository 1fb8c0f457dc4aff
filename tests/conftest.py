"""Property tests draw the same examples in every run, and none fails because a machine is slow."""

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

# Where the tests run as a shell's background job, what they start would ignore Ctrl-C with them.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests share the cores with servers

settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")

LIVE = ("tests/integration/", "tests/e2e/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs against live processes has a second try, which the summary counts; everything else has one."""
    for item in items:
        if item.nodeid.startswith(LIVE):
            item.add_marker(pytest.mark.flaky(reruns=1))
