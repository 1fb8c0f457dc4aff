"""Runs one controller in a process of its own, so that tests can kill it: ``python -m ... REDIS_URL CONFIG_JSON``."""

from __future__ import annotations

import asyncio
import sys

import pytest
from pydantic import TypeAdapter

from controller.config import ControllerConfig
from controller.service import ControllerService
from tests.integration.control_harness import make_patient


async def main(redis_url: str, config: str) -> None:
    service = ControllerService(TypeAdapter(ControllerConfig).validate_json(config), redis_url)
    print(await service.start(), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    make_patient(pytest.MonkeyPatch())
    asyncio.run(main(*sys.argv[1:]))
