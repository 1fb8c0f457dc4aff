"""What the controller last told of each model's engines, read from Redis in the background for whoever sheds."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Sequence

from pydantic import TypeAdapter

from cluster.router.loads import connect, end
from controller.arbiter import ArbiterObservation
from controller.settings import promise_key

POLL_S = 0.5
STALE_S = 5.0

_OBSERVATION = TypeAdapter(ArbiterObservation)

logger = logging.getLogger(__name__)


class PromiseReader:
    """All methods belong to one event loop."""

    def __init__(self, redis_url: str, key_prefix: str, models: Sequence[str]) -> None:
        self._client = connect(redis_url)
        self._models = tuple(models)
        self._keys = [promise_key(key_prefix, model) for model in models]
        self._promises: dict[str, ArbiterObservation] = {}
        self._read_s = float("-inf")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to read; later calls do nothing."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="promise-reader")

    def promise(self, model: str) -> ArbiterObservation | None:
        """None: the controller is silent, or Redis is."""
        return self._promises.get(model) if time.monotonic() - self._read_s <= STALE_S else None

    async def close(self) -> None:
        if self._task is not None:
            await end(self._task)
        await self._client.aclose()

    async def _run(self) -> None:
        while True:
            try:
                texts = await self._client.mget(self._keys)
                self._promises = {model: _parse(text) for model, text in zip(self._models, texts, strict=True) if text}
                self._read_s = time.monotonic()
            except Exception as error:  # whatever a lost connection or a stranger's key makes of it
                logger.debug("no promises: %s", error)
            await asyncio.sleep(POLL_S)


def _parse(text: bytes | str) -> ArbiterObservation:
    """What is null there is unknown or without end: the default here. Raises ValueError."""
    fields = {name: value for name, value in json.loads(text).items() if value is not None}
    return _OBSERVATION.validate_python({"ttft_level0_s": None, **fields})
