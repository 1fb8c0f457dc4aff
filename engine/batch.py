"""A step's inputs on the device, in one argument; there is no global context.

Rows are ordered: decode rows first (one per sequence), then the prefill chunks, sequence by sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from engine.types import Levels, Phase


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
    """What the dimmer knows of each row. ``levels`` is a tensor: a new level needs no new code path."""

    phase: Tensor  # [T], engine.types.Phase
    exact: Tensor  # [T] bool: the request refuses to be dimmed
    valid: Tensor  # [T] bool: False for rows that only pad a graph's batch, which the plain torch path never meets
    levels: Tensor  # [2], brownout level of each phase


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    token_ids: Tensor  # [T]
    positions: Tensor  # [T]
    attention: AttentionMetadata
    rows: RowInfo
    sequence_of_row: Tensor  # [T]
    sample_rows: Tensor  # [N'], rows whose logits are wanted


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    logits: Tensor  # [N', V] in the model's dtype
    dimmed_pairs: Tensor  # [T] int64: pairs of the row, over all layers, served by a united expert


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One sequence's next token: where it stands and whose blocks hold its context."""

    token_id: int
    position: int
    block_ids: list[int]
    exact: bool


@dataclass(frozen=True, slots=True)
class DecodeOutput:
    """``token_ids`` are the greedy choices; ``logits`` [N, V] stay on the device until the next replay."""

    token_ids: list[int]
    dimmed_pairs: list[int]
    logits: Tensor


class BatchBuilder:
    """Collects sequences on the host, then copies the step's inputs to the device. Add decode rows first."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._num_decodes = 0
        self._query_lens: list[int] = []
        self._context_lens: list[int] = []
        self._tables: list[list[int]] = []
        self._num_rows = 0
        self._token_ids: list[int] = []
        self._positions: list[np.ndarray] = []  # one array per sequence, like the next
        self._slots: list[np.ndarray] = []
        self._phase: list[int] = []
        self._exact: list[bool] = []
        self._sample_rows: list[int] = []

    def add(
        self,
        token_ids: list[int],
        start: int,
        block_ids: list[int],
        phase: Phase,
        exact: bool,
        samples: int,
    ) -> None:
        """Rows for the tokens at positions [start, start + len(token_ids)) of one sequence.

        The last ``samples`` of them get logits.
        """
        size, end = self._block_size, start + len(token_ids)
        table = block_ids[: -(-end // size)]
        positions = np.arange(start, end)
        self._num_decodes += phase is Phase.DECODE
        self._query_lens.append(len(token_ids))
        self._context_lens.append(end)
        self._tables.append(table)
        self._token_ids += token_ids
        self._positions.append(positions)
        self._slots.append(np.asarray(table)[positions // size] * size + positions % size)
        self._phase.append(int(phase))
        self._exact.append(exact)
        self._num_rows += len(token_ids)
        self._sample_rows += range(self._num_rows - samples, self._num_rows)

    def build(self, levels: Levels, device: torch.device) -> ForwardBatch:
        width = max(map(len, self._tables))

        def ints(values: list[int] | list[list[int]], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        def of_rows(values: Sequence[int]) -> Tensor:
            """One value per sequence, repeated for each of its rows."""
            return torch.from_numpy(np.repeat(np.asarray(values), self._query_lens)).to(device)

        return ForwardBatch(
            token_ids=torch.from_numpy(np.asarray(self._token_ids)).to(device),
            positions=torch.from_numpy(np.concatenate(self._positions)).to(device),
            attention=AttentionMetadata(
                num_decodes=self._num_decodes,
                query_lens=tuple(self._query_lens),
                context_lens=tuple(self._context_lens),
                prefill_starts_dev=ints([0, *accumulate(self._query_lens[self._num_decodes :])], torch.int32),
                context_lens_dev=ints(self._context_lens, torch.int32),
                block_table=ints([table + [0] * (width - len(table)) for table in self._tables], torch.int32),
                slot_mapping=torch.from_numpy(np.concatenate(self._slots)).to(device),
            ),
            rows=RowInfo(
                phase=of_rows(self._phase),
                exact=of_rows(self._exact),
                valid=torch.ones(self._num_rows, dtype=torch.bool, device=device),
                levels=ints([levels.prefill, levels.decode]),
            ),
            sequence_of_row=of_rows(range(len(self._query_lens))),
            sample_rows=ints(self._sample_rows),
        )
