"""What a replica tells about itself, in one piece. Pure data."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.telemetry import Totals
from engine.types import EngineStats, ModelInfo


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """One replica at one moment: what it serves, its load, its counters since start.

    ``address`` is where its channels are opened, which takes the ``token``.
    """

    replica_id: str
    pid: int
    info: ModelInfo
    stats: EngineStats
    totals: Totals
    address: str = ""
    token: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class SwapReport:
    """How a replica's swap of united experts ended; ``error``: why it did not happen, "" if it did."""

    replica_id: str
    error: str = ""
