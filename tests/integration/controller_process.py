"""Runs one controller in a process of its own, so that tests can kill it: ``python -m ... REDIS_URL LAW LEVEL``."""

from __future__ import annotations

import asyncio
import sys

from controller.config import ControllerConfig
from controller.service import ControllerService


async def main(redis_url: str, law: str, level: str) -> None:
    service = ControllerService(ControllerConfig(law=law, level=int(level)), redis_url)
    print(await service.start(), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
