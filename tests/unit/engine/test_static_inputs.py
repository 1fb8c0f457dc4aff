"""What a step's fixed arrays hold, against fresh tensors of the same step."""

from __future__ import annotations

import numpy as np
import torch

from engine.batch import StepRows, to_device
from engine.static_inputs import StaticInputs
from engine.types import Levels

CPU = torch.device("cpu")
BLOCK_SIZE, MAX_BLOCKS, NUM_PLACES = 4, 5, 6


def make_inputs() -> StaticInputs:
    return StaticInputs(max_rows=40, max_num_seqs=NUM_PLACES, max_blocks=MAX_BLOCKS, block_size=BLOCK_SIZE, device=CPU)


def mixed_step() -> StepRows:
    """Two decode rows, the second token known to the device only, and chunks of three and two rows."""
    return StepRows(
        num_decodes=2,
        places=np.array([2, 5, 0, 1]),
        starts=np.array([5, 8, 2, 0]),
        counts=np.array([1, 1, 3, 2]),
        samples=np.array([True, True, False, True]),
        num_logits=np.array([1, 1, 0, 1]),
        exact=np.array([True, False, False, True]),
        tables=np.arange(1, 1 + 4 * MAX_BLOCKS, dtype=np.int32).reshape(4, MAX_BLOCKS),
        token_ids=np.array([7, -1 - 5, 1, 2, 3, 4, 5]),
    )


def test_a_padded_step_says_the_same_as_fresh_tensors() -> None:
    inputs, rows, levels = make_inputs(), mixed_step(), Levels(prefill=1, decode=2)
    inputs.newest[5] = 99
    inputs.fill(rows, levels, 16, NUM_PLACES)
    layout = inputs.device_layout(16, NUM_PLACES)
    padded = inputs.batch(layout, rows)
    fresh = to_device(rows, BLOCK_SIZE, levels, CPU, inputs.newest.long())
    real = rows.num_rows
    assert fresh.token_ids.tolist() == [7, 99, 1, 2, 3, 4, 5]
    for name in ("token_ids", "positions", "sequence_of_row"):
        assert getattr(padded, name)[:real].tolist() == getattr(fresh, name).tolist(), name
    assert padded.logit_rows[:3].tolist() == fresh.logit_rows.tolist()
    for name in ("phase", "exact"):
        assert getattr(padded.rows, name)[:real].tolist() == getattr(fresh.rows, name).tolist(), name
    assert padded.rows.levels.tolist() == fresh.rows.levels.tolist() == [1, 2]
    assert padded.rows.valid.tolist() == [1] * real + [0] * (16 - real)
    ours, theirs = padded.attention, fresh.attention
    assert (ours.num_decodes, ours.query_lens, ours.context_lens) == (2, theirs.query_lens, theirs.context_lens)
    assert ours.prefill_starts_dev.tolist() == theirs.prefill_starts_dev.tolist() == [0, 3, 5]
    assert ours.context_lens_dev.tolist() == theirs.context_lens_dev.tolist()
    assert ours.slot_mapping[:real].tolist() == theirs.slot_mapping.tolist()
    assert ours.slot_mapping[real:].tolist() == [0] * (16 - real)
    assert ours.block_table.tolist() == rows.tables.tolist()
    assert layout.sample_places.tolist() == [2, 5, 1] + [NUM_PLACES] * 3


def test_padding_sequences_of_a_decode_step_see_one_token_of_block_0() -> None:
    inputs = make_inputs()
    inputs.fill(mixed_step(), Levels(), 16, NUM_PLACES)  # leaves its numbers where the next step has padding
    ones = np.ones(3, dtype=int)
    tables = np.full((3, MAX_BLOCKS), 9, dtype=np.int32)
    inputs.fill(StepRows.decodes(ones, ones, tables), Levels(), 4, 4)
    batch = inputs.batch(inputs.device_layout(4, 4))
    assert batch.attention.context_lens_dev.tolist() == [2, 2, 2, 1]
    assert batch.attention.block_table[:, 0].tolist() == [9, 9, 9, 0]
    assert batch.rows.valid.tolist() == [1, 1, 1, 0]


def test_blank_layouts_hold_padding_only() -> None:
    inputs = make_inputs()
    inputs.fill(mixed_step(), Levels(), 16, NUM_PLACES)
    layout = inputs.device_layout(8, 3)
    inputs.blank(layout)
    assert layout.context_lens.tolist() == [1, 1, 1]
    assert layout.sample_places.tolist() == [NUM_PLACES] * 3
    assert layout.sources.tolist() == [NUM_PLACES] * 8
    assert not layout.valid.any() and not layout.table.any() and not layout.slots.any()
