"""Requests that wait for a place in the batch, first come first served. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from engine.scheduler.sequence import Sequence


class WaitingQueue:
    """FIFO with removal by id and a running total of the prefill tokens it holds."""

    def __init__(self) -> None:
        self._sequences: OrderedDict[str, Sequence] = OrderedDict()
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences.values())

    def push(self, sequence: Sequence) -> None:
        self._sequences[sequence.request_id] = sequence
        self.num_tokens += sequence.num_uncomputed

    def push_front(self, sequence: Sequence) -> None:
        """For a preempted sequence, which keeps its turn."""
        self.push(sequence)
        self._sequences.move_to_end(sequence.request_id, last=False)

    def peek(self) -> Sequence:
        return next(iter(self._sequences.values()))

    def pop(self) -> Sequence:
        _, sequence = self._sequences.popitem(last=False)
        self.num_tokens -= sequence.num_uncomputed
        return sequence

    def remove(self, request_id: str) -> Sequence | None:
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self.num_tokens -= sequence.num_uncomputed
        return sequence
