"""Who gives up its blocks when they run out. Pure."""

from __future__ import annotations

from engine.scheduler.sequence import Sequence


def choose_victim(running: list[Sequence]) -> Sequence:
    """The latest arrival of the greatest priority value: it has lost least, and the oldest always makes progress.

    Of arrivals at the same time the last admitted, so that two of them cannot take turns at evicting each other.
    """
    return max(reversed(running), key=lambda sequence: (sequence.request.priority, sequence.arrival_s))
