"""Waiting for something to become true. The deadline costs nothing while all goes well, so it is far off."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

TIMEOUT_S = 120.0


def until(holds: Callable[[], object], timeout_s: float = TIMEOUT_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, f"waited {timeout_s} s in vain"
        time.sleep(0.05)


async def until_async(holds: Callable[[], object], timeout_s: float = TIMEOUT_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, f"waited {timeout_s} s in vain"
        await asyncio.sleep(0.005)
