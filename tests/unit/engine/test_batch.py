from __future__ import annotations

import numpy as np
import torch

from engine.batch import StepRows, to_device
from engine.types import Levels, Phase

CPU = torch.device("cpu")


def step(**changes: object) -> StepRows:
    """A decode row at position 5, a chunk of three rows from position 2 on and a whole prompt of two."""
    arrays: dict[str, object] = {
        "num_decodes": 1,
        "places": np.array([2, 0, 1]),
        "starts": np.array([5, 2, 0]),
        "counts": np.array([1, 3, 2]),
        "samples": np.array([True, False, True]),
        "num_logits": np.array([1, 0, 1]),
        "exact": np.array([True, False, False]),
        "tables": np.array([[3, 9, 8, 7], [5, 6, 1, 1], [2, 4, 0, 0]], dtype=np.int32),
        "token_ids": np.array([7, 1, 2, 3, 4, 5]),
    }
    return StepRows(**(arrays | changes))  # type: ignore[arg-type]


def test_rows_slots_and_tables() -> None:
    batch = to_device(step(), 4, Levels(prefill=1, decode=2), CPU)
    assert batch.token_ids.tolist() == [7, 1, 2, 3, 4, 5]
    assert batch.positions.tolist() == [5, 2, 3, 4, 0, 1]
    assert batch.sequence_of_row.tolist() == [0, 1, 1, 1, 2, 2]
    assert batch.logit_rows.tolist() == [0, 5]
    assert batch.rows.phase.tolist() == [1, 0, 0, 0, 0, 0]
    assert batch.rows.exact.tolist() == [True, False, False, False, False, False]
    assert [batch.rows.levels[phase].item() for phase in (Phase.PREFILL, Phase.DECODE)] == [1, 2]
    attention = batch.attention
    assert (attention.num_decodes, attention.query_lens, attention.context_lens) == (1, (1, 3, 2), (6, 5, 2))
    assert attention.block_table.tolist() == [[3, 9], [5, 6], [2, 0]]  # blocks beyond the tokens are not read
    assert attention.slot_mapping.tolist() == [9 * 4 + 1, 5 * 4 + 2, 5 * 4 + 3, 6 * 4, 2 * 4, 2 * 4 + 1]
    assert attention.prefill_starts_dev.tolist() == [0, 3, 5]


def test_a_token_that_only_the_device_knows_is_read_there() -> None:
    newest = torch.tensor([40, 41, 42])
    batch = to_device(step(token_ids=np.array([-1 - 2, 1, 2, 3, 4, 5])), 4, Levels(), CPU, newest)
    assert batch.token_ids.tolist() == [42, 1, 2, 3, 4, 5]


def test_a_chunk_may_sample_nothing() -> None:
    batch = to_device(step(samples=np.zeros(3, dtype=bool), num_logits=np.zeros(3, dtype=int)), 4, Levels(), CPU)
    assert batch.logit_rows.tolist() == []
    assert batch.logit_rows.dtype == torch.int64


def test_a_prompt_may_want_the_logits_of_several_rows() -> None:
    batch = to_device(step(num_logits=np.array([1, 2, 2])), 4, Levels(), CPU)
    assert batch.logit_rows.tolist() == [0, 2, 3, 4, 5]
