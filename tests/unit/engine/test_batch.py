from __future__ import annotations

import torch

from engine.batch import BatchBuilder
from engine.types import Levels, Phase


def test_rows_slots_and_tables() -> None:
    builder = BatchBuilder(block_size=4)
    builder.add([7], 5, [3, 9, 8], Phase.DECODE, exact=True, samples=True)  # a reserved third block is not read
    builder.add([1, 2, 3], 2, [5, 6], Phase.PREFILL, exact=False, samples=False)
    builder.add([4, 5], 0, [2], Phase.PREFILL, exact=False, samples=True)
    batch = builder.build(Levels(prefill=1, decode=2), torch.device("cpu"))
    assert batch.token_ids.tolist() == [7, 1, 2, 3, 4, 5]
    assert batch.positions.tolist() == [5, 2, 3, 4, 0, 1]
    assert batch.sequence_of_row.tolist() == [0, 1, 1, 1, 2, 2]
    assert batch.sample_rows.tolist() == [0, 5]
    assert batch.rows.phase.tolist() == [1, 0, 0, 0, 0, 0]
    assert batch.rows.exact.tolist() == [True, False, False, False, False, False]
    assert [batch.rows.levels[phase].item() for phase in (Phase.PREFILL, Phase.DECODE)] == [1, 2]
    attention = batch.attention
    assert (attention.num_decodes, attention.query_lens, attention.context_lens) == (1, (1, 3, 2), (6, 5, 2))
    assert attention.block_table.tolist() == [[3, 9], [5, 6], [2, 0]]
    assert attention.slot_mapping.tolist() == [9 * 4 + 1, 5 * 4 + 2, 5 * 4 + 3, 6 * 4, 2 * 4, 2 * 4 + 1]


def test_a_chunk_may_sample_nothing() -> None:
    builder = BatchBuilder(block_size=4)
    builder.add([1, 2], 0, [1], Phase.PREFILL, exact=False, samples=False)
    batch = builder.build(Levels(), torch.device("cpu"))
    assert batch.sample_rows.tolist() == []
    assert batch.sample_rows.dtype == torch.int64
