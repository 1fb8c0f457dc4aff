"""A step's inputs, on the host and on the device, each in one argument; there is no global context.

Rows are ordered: decode rows first (one per sequence), then the prefill chunks, sequence by sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.types import Levels, Phase

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where each row's keys and values go and which earlier ones it sees. N sequences, T rows."""

    num_decodes: int  # the first num_decodes sequences have one row each
    query_lens: tuple[int, ...]  # N rows per sequence
    context_lens: tuple[int, ...]  # N tokens with KV after this step, the new ones included
    prefill_starts_dev: Tensor  # [N - num_decodes + 1] int32, first prefill row of each other sequence, then the end
    context_lens_dev: Tensor  # [N] int32
    block_table: Tensor  # [N, max_blocks] int32, padded with block 0
    slot_mapping: Tensor  # [T], block * block_size + offset of each row's KV


@dataclass(frozen=True, slots=True)
class RowInfo:
    """What the dimmer knows of each row. ``levels`` is a tensor: a new level needs no new code path.

    Levels are resolved for the step's size by the ladder: they are indices into its settings, 0 is exact.
    """

    phase: Tensor  # [T], engine.types.Phase
    exact: Tensor  # [T] bool: the request refuses to be dimmed
    valid: Tensor  # [T] bool: False for rows that only pad a graph's batch, which the plain torch path never meets
    levels: Tensor  # [2], setting of each phase
    host_levels: tuple[int, int] | None = None  # the same; None while a graph is captured, which serves all settings


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's inputs on the device: T rows of N sequences, N' of which have logits wanted."""

    token_ids: Tensor  # [T]
    positions: Tensor  # [T]
    attention: AttentionMetadata
    rows: RowInfo
    sequence_of_row: Tensor  # [T]
    logit_rows: Tensor  # [N'], rows whose logits are wanted


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """What a step computes, still on the device."""

    logits: Tensor  # [N', V] in the model's dtype
    dimmed_pairs: Tensor  # [T] int64: pairs of the row, over all layers, served by a united expert


@dataclass(frozen=True, slots=True, eq=False)
class StepRows:
    """A step on the host: N sequences in T rows."""

    num_decodes: int
    places: Array  # [N] place in the batch of each sequence
    starts: Array  # [N] position of the first token to compute
    counts: Array  # [N] tokens to compute
    samples: Array  # [N] bool: the next token is wanted
    num_logits: Array  # [N] last rows of which logits are wanted: 1 to sample, more for a prompt's own
    exact: Array  # [N] bool
    tables: Array  # [N, >= blocks of the longest] int32 block ids; entries beyond a sequence's tokens mean nothing
    token_ids: Array  # [T]; -1 - place stands for that place's newest token, which only the device knows yet

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    @property
    def ends(self) -> Array:
        """[N] tokens with KV after this step."""
        ends: Array = self.starts + self.counts
        return ends

    @property
    def sequence_of_row(self) -> Array:
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @property
    def sample_rows(self) -> Array:
        last_rows: Array = np.cumsum(self.counts) - 1
        return last_rows[self.samples]

    @property
    def logit_rows(self) -> Array:
        row_ends, logit_ends = np.cumsum(self.counts), np.cumsum(self.num_logits)
        rows: Array = np.arange(self.num_logits.sum()) + np.repeat(row_ends - logit_ends, self.num_logits)
        return rows

    def positions_and_slots(self, block_size: int) -> tuple[Array, Array]:
        """[T] each: position in its sequence, and block * block_size + offset."""
        sequences = self.sequence_of_row
        first_rows = np.cumsum(self.counts) - self.counts
        positions = np.arange(self.num_rows) + (self.starts - first_rows)[sequences]
        slots: Array = self.tables[sequences, positions // block_size] * block_size + positions % block_size
        return positions, slots

    def prefill_starts(self) -> Array:
        return np.concatenate(([0], np.cumsum(self.counts[self.num_decodes :])))

    def phases(self) -> Array:
        """[T]"""
        phases = np.full(self.num_rows, int(Phase.PREFILL))
        phases[: self.num_decodes] = int(Phase.DECODE)
        return phases

    @staticmethod
    def decodes(token_ids: Array, positions: Array, tables: Array) -> StepRows:
        """One row per sequence, all dimmable: for measurements. [N], [N], [N, max_blocks]"""
        ones = np.ones(len(token_ids), dtype=int)
        return StepRows(
            len(ones), np.arange(len(ones)), positions, ones, ones > 0, ones, ones == 0, tables, token_ids
        )  # fmt: skip

    @staticmethod
    def prompts(token_ids: Array, tables: Array, samples: bool) -> StepRows:
        """Whole prompts of one length, all dimmable: for measurements and calibration. [N, length], [N, max_blocks]"""
        num, length = token_ids.shape
        places, ones = np.arange(num), np.ones(num, dtype=int)
        wanted = ones * samples
        return StepRows(
            0, places, ones * 0, ones * length, wanted > 0, wanted, ones == 0, tables, token_ids.ravel()
        )  # fmt: skip


def to_device(
    rows: StepRows, block_size: int, levels: Levels, device: torch.device, newest: Tensor | None = None
) -> ForwardBatch:
    """Fresh tensors for one step. ``newest`` [places] holds what negative token ids stand for."""

    def put(values: Array, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device, dtype)

    positions, slots = rows.positions_and_slots(block_size)
    sequences, ends = rows.sequence_of_row, rows.ends
    width = int(-(-ends.max() // block_size))
    used = np.arange(width) < -(-ends[:, None] // block_size)
    token_ids = put(rows.token_ids)
    if newest is not None and (rows.token_ids < 0).any():
        token_ids = torch.where(token_ids < 0, newest[(-1 - token_ids).clamp(min=0)], token_ids)
    return ForwardBatch(
        token_ids=token_ids,
        positions=put(positions),
        attention=AttentionMetadata(
            num_decodes=rows.num_decodes,
            query_lens=tuple(rows.counts.tolist()),
            context_lens=tuple(ends.tolist()),
            prefill_starts_dev=put(rows.prefill_starts(), torch.int32),
            context_lens_dev=put(ends, torch.int32),
            block_table=put(np.where(used, rows.tables[:, :width], 0), torch.int32),
            slot_mapping=put(slots),
        ),
        rows=RowInfo(
            phase=put(rows.phases()),
            exact=put(rows.exact[sequences], torch.bool),
            valid=torch.ones(rows.num_rows, dtype=torch.bool, device=device),
            levels=torch.tensor([levels.prefill, levels.decode], device=device),
            host_levels=(levels.prefill, levels.decode),
        ),
        sequence_of_row=put(sequences),
        logit_rows=put(rows.logit_rows),
    )
