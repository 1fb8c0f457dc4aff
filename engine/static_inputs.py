"""Step inputs at fixed addresses, as CUDA graphs need them: laid out on the host, sent in one copy.

The device buffer begins with the newest token of every place, which steps write and later steps read. Behind it lies
one step's input; where each array of it stands depends on the step's padded size, a `Layout`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from engine.batch import Array, AttentionMetadata, ForwardBatch, RowInfo, StepRows
from engine.types import Levels

ALIGNMENT = 16  # numbers; kernels load whole vectors
NUM_HOST_BUFFERS = 2  # one is filled while the other may still be under way to the device

Part = TypeVar("Part", Array, Tensor)


@dataclass(frozen=True, slots=True)
class Layout(Generic[Part]):
    """Views of one buffer for steps of up to R rows of up to N sequences: arrays on the host, tensors on the device."""

    first_token: int  # where in the buffer token_ids begin
    first_entry: int  # ... and the table
    levels: Part  # [2]
    prefill_starts: Part  # [N + 1]
    context_lens: Part  # [N]
    sample_rows: Part  # [N]
    sample_places: Part  # [N] padded with the place of nobody
    sources: Part  # [R] where in the device buffer the row's token stands
    token_ids: Part  # [R] tokens that the host knows
    positions: Part  # [R]
    slots: Part  # [R]
    exact: Part  # [R]
    valid: Part  # [R]
    phases: Part  # [R]
    sequences: Part  # [R]
    table: Part  # [N, max_blocks]; last, so that only its used rows need to be sent

    @staticmethod
    def of(buffer: Part, first: int, num_rows: int, num_sequences: int, max_blocks: int) -> Layout[Part]:
        starts, views = [], []
        for length in (2, num_sequences + 1, *(num_sequences,) * 3, *(num_rows,) * 8):
            starts.append(first)
            views.append(buffer[first : first + length])
            first += _aligned(length)
        views.append(buffer[first : first + num_sequences * max_blocks].reshape(num_sequences, max_blocks))
        return Layout(starts[6], first, *views)

    @staticmethod
    def size(num_rows: int, num_sequences: int, max_blocks: int) -> int:
        per_sequence = _aligned(num_sequences + 1) + 3 * _aligned(num_sequences) + num_sequences * max_blocks
        return _aligned(2) + per_sequence + 8 * _aligned(num_rows)


class StaticInputs:
    def __init__(
        self, max_rows: int, max_num_seqs: int, max_blocks: int, block_size: int, device: torch.device
    ) -> None:
        self._max_blocks, self._block_size = max_blocks, block_size
        self._nobody = max_num_seqs
        self._first = _aligned(max_num_seqs + 1)
        size = self._first + Layout.size(max_rows, max_num_seqs, max_blocks)
        self._device_buffer = torch.zeros(size, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self._host_buffers = [torch.zeros(size, dtype=torch.int32, pin_memory=pinned) for _ in range(NUM_HOST_BUFFERS)]
        self._sent = [torch.cuda.Event() if pinned else None for _ in range(NUM_HOST_BUFFERS)]
        self._host_arrays = [buffer.numpy() for buffer in self._host_buffers]
        self._layouts: dict[tuple[int, int, int], Layout[Array]] = {}  # (host buffer, rows, sequences) |-> views
        self._device_layouts: dict[tuple[int, int], Layout[Tensor]] = {}
        self._turn = 0
        self.newest = self._device_buffer[: max_num_seqs + 1]
        self._token_ids = torch.zeros(max_rows, dtype=torch.int32, device=device)

    def device_layout(self, num_rows: int, num_sequences: int) -> Layout[Tensor]:
        key = num_rows, num_sequences
        if key not in self._device_layouts:
            self._device_layouts[key] = Layout.of(self._device_buffer, self._first, *key, self._max_blocks)
        return self._device_layouts[key]

    def _host_layout(self, num_rows: int, num_sequences: int) -> Layout[Array]:
        key = self._turn, num_rows, num_sequences
        if key not in self._layouts:
            self._layouts[key] = Layout.of(self._host_arrays[self._turn], self._first, *key[1:], self._max_blocks)
        return self._layouts[key]

    def blank(self, layout: Layout[Tensor]) -> None:
        """Make the layout hold a step of padding rows."""
        self._device_buffer[self._first :].zero_()
        layout.context_lens.fill_(1)
        layout.sample_places.fill_(self._nobody)
        layout.sources.fill_(self._nobody)

    def fill(self, rows: StepRows, levels: Levels, num_rows: int, num_sequences: int) -> None:
        """Send a step, padded to the layout's size. Padding rows write their KV to block 0 and get no expert."""
        self._turn = (self._turn + 1) % NUM_HOST_BUFFERS
        host, sent = self._host_buffers[self._turn], self._sent[self._turn]
        if sent is not None:
            sent.synchronize()
        layout = self._host_layout(num_rows, num_sequences)
        count, total = len(rows.places), rows.num_rows
        positions, slots = rows.positions_and_slots(self._block_size)
        sequences = rows.sequence_of_row
        own = np.arange(layout.first_token, layout.first_token + total)
        layout.levels[:] = levels.prefill, levels.decode
        _put(layout.prefill_starts, rows.prefill_starts())
        _put(layout.context_lens, rows.ends, padding=1)
        _put(layout.sample_rows, rows.sample_rows)
        _put(layout.sample_places, rows.places[rows.samples], padding=self._nobody)
        _put(layout.sources, np.where(rows.token_ids < 0, -1 - rows.token_ids, own), padding=self._nobody)
        _put(layout.token_ids, rows.token_ids)
        _put(layout.positions, positions)
        _put(layout.slots, slots)
        _put(layout.exact, rows.exact[sequences])
        _put(layout.valid, np.ones(total))
        _put(layout.phases, rows.phases(), padding=1)
        _put(layout.sequences, sequences)
        layout.table[:count, : rows.tables.shape[1]] = rows.tables
        layout.table[count:, 0] = 0
        num_sent = num_sequences if num_sequences == num_rows else count  # only whole graphs read padding sequences
        end = layout.first_entry + num_sent * self._max_blocks
        self._device_buffer[self._first : end].copy_(host[self._first : end], non_blocking=True)
        if sent is not None:
            sent.record()

    def newest_of_samples(self, layout: Layout[Tensor], num_samples: int) -> Tensor:
        """The newest token of each sequence that samples, as it was before the step. [num_samples]"""
        return self._token_ids[layout.sample_rows[:num_samples]]

    def batch(self, layout: Layout[Tensor], rows: StepRows | None = None, levels: Levels | None = None) -> ForwardBatch:
        """The layout as the model reads it; without ``rows`` as decode rows only, their lengths on the device alone."""
        host_levels = None if levels is None else (levels.prefill, levels.decode)
        num_sequences = len(layout.context_lens)
        num_decodes = num_sequences if rows is None else rows.num_decodes
        if rows is not None:
            num_sequences = len(rows.places)
        return ForwardBatch(
            token_ids=torch.index_select(
                self._device_buffer, 0, layout.sources, out=self._token_ids[: len(layout.sources)]
            ),
            positions=layout.positions,
            attention=AttentionMetadata(
                num_decodes=num_decodes,
                query_lens=() if rows is None else tuple(rows.counts.tolist()),
                context_lens=() if rows is None else tuple(rows.ends.tolist()),
                prefill_starts_dev=layout.prefill_starts[: num_sequences - num_decodes + 1],
                context_lens_dev=layout.context_lens[:num_sequences],
                block_table=layout.table[:num_sequences],
                slot_mapping=layout.slots,
            ),
            rows=RowInfo(layout.phases, layout.exact, layout.valid, layout.levels, host_levels),
            sequence_of_row=layout.sequences,
            logit_rows=layout.sample_rows,
        )


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def _put(target: Array, values: Array, padding: int = 0) -> None:
    target[: len(values)] = values
    target[len(values) :] = padding
