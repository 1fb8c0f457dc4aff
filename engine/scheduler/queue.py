"""Requests that wait for a place in the batch. Pure.

Those that are still on time before those that are late, then the least priority value, then first come first served.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import islice

from engine.scheduler.sequence import Sequence

MAX_LOOKED_AT = 64  # per sweep: a step must not cost more the longer the queue is

Rank = tuple[bool, int]  # (late, priority)


class WaitingQueue:
    """A FIFO per rank, with removal by id and running totals of the prefill tokens it holds."""

    def __init__(self) -> None:
        self._fifos: dict[Rank, OrderedDict[str, Sequence]] = {}  # rank |-> request id |-> sequence; none is empty
        self._rank_of: dict[str, Rank] = {}
        self.num_tokens = 0
        self.num_tokens_on_time = 0

    def __len__(self) -> int:
        return len(self._rank_of)

    def __iter__(self) -> Iterator[Sequence]:
        for rank in sorted(self._fifos):
            yield from self._fifos[rank].values()

    def heads(self) -> Iterator[Sequence]:
        """The next few of every rank, among them its oldest."""
        for fifo in self._fifos.values():
            yield from islice(fifo.values(), MAX_LOOKED_AT)

    def push(self, sequence: Sequence) -> None:
        self._put(sequence, late=False)

    def push_front(self, sequence: Sequence) -> None:
        """For a preempted sequence, which keeps its turn."""
        self.push(sequence)
        self._fifos[self._rank_of[sequence.request_id]].move_to_end(sequence.request_id, last=False)

    def peek(self) -> Sequence:
        return next(iter(self._fifos[min(self._fifos)].values()))

    def pop(self) -> Sequence:
        sequence = self.peek()
        self.remove(sequence.request_id)
        return sequence

    def remove(self, request_id: str) -> Sequence | None:
        rank = self._rank_of.pop(request_id, None)
        if rank is None:
            return None
        fifo = self._fifos[rank]
        sequence = fifo.pop(request_id)
        if not fifo:
            del self._fifos[rank]
        self._count(sequence, rank, -1)
        return sequence

    def relegate(self, is_late: Callable[[Sequence], bool]) -> None:
        """Put those of the next requests that are late behind all that are not, in their order."""
        for sequence in self._next(late=False, until=None):
            if is_late(sequence):
                self.remove(sequence.request_id)
                self._put(sequence, late=True)

    def recall(self, has_waited_enough: Callable[[Sequence], bool]) -> None:
        """Put the late ones that have been passed over for long enough before the others of their priority."""
        for sequence in reversed(self._next(late=True, until=has_waited_enough)):
            self.remove(sequence.request_id)
            self.push_front(sequence)

    def _next(self, late: bool, until: Callable[[Sequence], bool] | None) -> list[Sequence]:
        """The next few of the late, or of the others; of each priority only as long as ``until`` holds."""
        found: list[Sequence] = []
        for rank in sorted(rank for rank in self._fifos if rank[0] is late):
            for sequence in islice(self._fifos[rank].values(), MAX_LOOKED_AT):
                if until is not None and not until(sequence):
                    break
                found.append(sequence)
        return found

    def _put(self, sequence: Sequence, late: bool) -> None:
        rank = (late, sequence.request.priority)
        self._fifos.setdefault(rank, OrderedDict())[sequence.request_id] = sequence
        self._rank_of[sequence.request_id] = rank
        self._count(sequence, rank, 1)

    def _count(self, sequence: Sequence, rank: Rank, sign: int) -> None:
        self.num_tokens += sign * sequence.num_uncomputed
        self.num_tokens_on_time += 0 if rank[0] else sign * sequence.num_uncomputed
