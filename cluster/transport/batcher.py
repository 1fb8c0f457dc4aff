"""Collects what is to be sent while the last message is still on its way, so that it leaves as one."""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Batcher(Generic[Item]):
    """``put`` never waits; ``take`` waits for something and takes all of it. Belongs to one event loop."""

    def __init__(self) -> None:
        self._items: list[Item] = []
        self._filled = asyncio.Event()

    def put(self, item: Item) -> None:
        self._items.append(item)
        self._filled.set()

    async def take(self) -> list[Item]:
        await self._filled.wait()
        self._filled.clear()
        items, self._items = self._items, []
        return items
