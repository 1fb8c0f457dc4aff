"""The Serve application with replicas whose engine can be made to hang inside a step. For tests of what follows."""

from __future__ import annotations

import threading
from typing import Any

from ray import serve

from cluster.app import application
from cluster.replica import EngineReplica

IMPORT_PATH = "tests.e2e.wedging_app:build"


class WedgingReplica(EngineReplica):
    """`EngineReplica`, and a way to break it."""

    async def wedge(self, replica_id: str) -> bool:
        """Let the replica of that id compute for ever from its next step on, as a kernel that never ends would: its
        event loop goes on, only the engine's thread does not. Returns whether this is it.
        """
        if self._replica_id != replica_id:
            return False
        engine = self._engine._engine
        assert engine._runner is not None
        engine._runner.slot.model.forward = _hang  # type: ignore[method-assign]
        return True


def _hang(*_: object) -> Any:
    threading.Event().wait()


def build(args: dict[str, Any]) -> serve.Application:
    return application(args, WedgingReplica)
