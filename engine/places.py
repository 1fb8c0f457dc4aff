"""The host's mirror of who sits where in the batch: block tables that grow by what is new, whatever the history.

A running sequence keeps one place (an index below max_num_seqs) from admission to its end or preemption.
"""

from __future__ import annotations

from itertools import chain

import numpy as np

from engine.batch import StepRows
from engine.kv_cache.blocks import BlockManager
from engine.scheduler.scheduler import ScheduledBatch, ScheduledSequence


class Places:
    def __init__(self, num_places: int, max_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._tables = np.zeros((num_places, max_blocks), dtype=np.int32)
        self._num_known = [0] * num_places  # blocks in the table
        self._admissions = [0] * num_places  # whose they are

    def rows(self, batch: ScheduledBatch, blocks: BlockManager, num_logits: list[int] | None = None) -> StepRows:
        """The scheduled step as arrays; without ``num_logits`` only tokens to sample from get any.

        Costs O(sequences + prefill tokens + new blocks).
        """
        items = [*batch.decodes, *batch.prefills]
        for item in items:
            self._follow(item, blocks)
        places = np.array([item.sequence.place for item in items])
        samples = np.array([item.samples for item in items])
        return StepRows(
            num_decodes=len(batch.decodes),
            places=places,
            starts=np.array([item.start for item in items]),
            counts=np.array([item.num_tokens for item in items]),
            samples=samples,
            num_logits=samples.astype(int) if num_logits is None else np.array(num_logits),
            exact=np.array([item.sequence.exact for item in items]),
            tables=self._tables[places],
            token_ids=np.fromiter(chain.from_iterable(map(_token_ids, items)), dtype=np.int64, count=batch.num_tokens),
        )

    def _follow(self, item: ScheduledSequence, blocks: BlockManager) -> None:
        sequence, place = item.sequence, item.sequence.place
        if self._admissions[place] != sequence.admission:
            self._admissions[place], self._num_known[place] = sequence.admission, 0
        num_known = self._num_known[place]
        if num_known * self._block_size < item.end:
            new = blocks.block_ids(sequence.request_id, num_known)
            self._tables[place, num_known : num_known + len(new)] = new
            self._num_known[place] = num_known + len(new)


def _token_ids(item: ScheduledSequence) -> list[int]:
    """The tokens to compute; one that the device has chosen but the host not seen yet is -1 - place."""
    sequence = item.sequence
    known = sequence.token_ids[item.start : item.end]
    return known if len(known) == item.num_tokens else [*known, -1 - sequence.place]
