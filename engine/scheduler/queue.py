"""Requests that wait for a place in the batch: the least priority value first, then first come first served. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from engine.scheduler.sequence import Sequence


class WaitingQueue:
    """A FIFO per priority, with removal by id and a running total of the prefill tokens it holds."""

    def __init__(self) -> None:
        self._fifos: dict[int, OrderedDict[str, Sequence]] = {}  # priority |-> request id |-> sequence; none is empty
        self._priority_of: dict[str, int] = {}
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._priority_of)

    def __iter__(self) -> Iterator[Sequence]:
        for priority in sorted(self._fifos):
            yield from self._fifos[priority].values()

    def push(self, sequence: Sequence) -> None:
        priority = sequence.request.priority
        self._fifos.setdefault(priority, OrderedDict())[sequence.request_id] = sequence
        self._priority_of[sequence.request_id] = priority
        self.num_tokens += sequence.num_uncomputed

    def push_front(self, sequence: Sequence) -> None:
        """For a preempted sequence, which keeps its turn."""
        self.push(sequence)
        self._fifos[sequence.request.priority].move_to_end(sequence.request_id, last=False)

    def peek(self) -> Sequence:
        return next(iter(self._fifos[min(self._fifos)].values()))

    def pop(self) -> Sequence:
        sequence = self.peek()
        self.remove(sequence.request_id)
        return sequence

    def remove(self, request_id: str) -> Sequence | None:
        priority = self._priority_of.pop(request_id, None)
        if priority is None:
            return None
        fifo = self._fifos[priority]
        sequence = fifo.pop(request_id)
        if not fifo:
            del self._fifos[priority]
        self.num_tokens -= sequence.num_uncomputed
        return sequence
