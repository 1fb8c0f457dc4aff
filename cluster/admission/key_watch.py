"""The keys as one ingress process knows them: read from their stores in the background, never on a request's path.

A store that does not answer, or has lost all it had, changes nothing: the keys last read stay valid.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from cluster.admission.key_store import KeyStore, KeyStoreError
from cluster.admission.keys import KeyRecord, KeyRing

POLL_S = 1.0  # so long after a change every ingress goes by it

logger = logging.getLogger(__name__)


class KeyWatch:
    """Reads once when it is made; goes on reading from the first `watch` on."""

    def __init__(self, stores: Sequence[KeyStore], poll_s: float = POLL_S) -> None:
        self._stores = stores
        self._poll_s = poll_s
        self._records: list[list[KeyRecord] | None] = [None] * len(stores)  # as last read; None: never
        self._faults = [""] * len(stores)
        self._task: asyncio.Task[None] | None = None
        self.ring = KeyRing()
        self.is_ready = False  # at least one store has been read
        self._take([_read(store) for store in stores])

    def watch(self) -> None:
        """Keep up to date from now on; later calls do nothing."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="key-watch")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            self._take(await asyncio.to_thread(lambda: [_read(store) for store in self._stores]))

    def _take(self, answers: Sequence[list[KeyRecord] | KeyStoreError | None]) -> None:
        changed = False
        for number, answer in enumerate(answers):
            before = self._records[number]
            if isinstance(answer, KeyStoreError):
                self._note(number, str(answer))
                continue
            self.is_ready = True
            if answer is None and before:
                self._note(number, "a key store has lost its keys; those known here stay valid")
            else:
                self._note(number, "")
                changed = changed or answer != before
                self._records[number] = answer
        if changed:
            self.ring = KeyRing(record for records in self._records for record in records or ())
            logger.info("%d API keys are known", len(self.ring))

    def _note(self, number: int, fault: str) -> None:
        """Log changes only."""
        if fault and fault != self._faults[number]:
            logger.error("%s", fault)
        self._faults[number] = fault


def _read(store: KeyStore) -> list[KeyRecord] | KeyStoreError | None:
    try:
        return store.load()
    except KeyStoreError as error:
        return error
    except Exception as error:  # the watch must outlive whatever a lost connection makes a client raise
        return KeyStoreError(f"a key store failed: {error!r}")
