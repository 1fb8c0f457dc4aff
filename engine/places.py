"""The host's mirror of who sits where in the batch: block tables that grow by what is new, whatever the history.

A running sequence keeps one place (an index below max_num_seqs) from admission to its end or preemption.
"""

from __future__ import annotations

from itertools import chain

import numpy as np

from engine.batch import Array, StepRows
from engine.kv_cache.blocks import BlockManager
from engine.scheduler.scheduler import ScheduledBatch, ScheduledSequence
from engine.scheduler.sequence import Sequence


class Places:
    def __init__(self, num_places: int, max_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._tables = np.zeros((num_places, max_blocks), dtype=np.int32)
        self._num_known = np.zeros(num_places, dtype=np.int64)  # blocks in the table
        self._admissions = np.zeros(num_places, dtype=np.int64)  # whose they are

    def rows(self, batch: ScheduledBatch, blocks: BlockManager, num_logits: list[int] | None = None) -> StepRows:
        """The scheduled step as arrays; without ``num_logits`` only tokens to sample from get any.

        Costs O(sequences + prefill tokens + new blocks).
        """
        items = [*batch.decodes, *batch.prefills]
        sequences = [item.sequence for item in items]
        columns = zip(*[item[1:] for item in items], strict=True)  # of ScheduledSequence, but for the first
        starts, counts, _, samples, admissions = (np.array(column) for column in columns)
        places, ends = np.array([sequence.place for sequence in sequences]), starts + counts
        self._follow(sequences, places, admissions, ends, blocks)
        token_ids = [_newest_id(item.sequence, item.start) for item in batch.decodes]
        token_ids.extend(chain.from_iterable(map(_token_ids, batch.prefills)))
        width = -(-int(ends.max()) // self._block_size)
        return StepRows(
            num_decodes=len(batch.decodes),
            places=places,
            starts=starts,
            counts=counts,
            samples=samples,
            num_logits=samples.astype(int) if num_logits is None else np.array(num_logits),
            exact=np.array([s.exact for s in sequences]),
            tables=self._tables[places, :width],
            token_ids=np.array(token_ids, dtype=np.int64),
        )

    def _follow(
        self, sequences: list[Sequence], places: Array, admissions: Array, ends: Array, blocks: BlockManager
    ) -> None:
        """Take over the blocks that sequences got since their last step."""
        self._num_known[places[self._admissions[places] != admissions]] = 0
        self._admissions[places] = admissions
        for index in np.flatnonzero(self._num_known[places] * self._block_size < ends).tolist():
            place, num_known = places[index], self._num_known[places[index]]
            new = blocks.block_ids(sequences[index].request_id, num_known)
            self._tables[place, num_known : num_known + len(new)] = new
            self._num_known[place] = num_known + len(new)


def _newest_id(sequence: Sequence, position: int) -> int:
    """The token to compute; one that the device has chosen but the host not seen yet is -1 - place."""
    token_ids = sequence.token_ids
    return token_ids[position] if position < len(token_ids) else -1 - sequence.place


def _token_ids(item: ScheduledSequence) -> list[int]:
    """The same for a chunk, of which only the last may be unknown."""
    known = item.sequence.token_ids[item.start : item.end]
    return known if len(known) == item.num_tokens else [*known, -1 - item.sequence.place]
