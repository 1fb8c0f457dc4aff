"""Who gives up its blocks when they run out. Pure."""

from __future__ import annotations

from engine.scheduler.sequence import Sequence


def choose_victim(running: list[Sequence]) -> Sequence:
    """The latest arrival: it has lost least, and the oldest always makes progress, so nobody starves."""
    return max(running, key=lambda sequence: sequence.arrival_s)
