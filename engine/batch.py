"""A step's inputs on the device, in one argument; there is no global context.

Rows are ordered: decode rows first (one per sequence), then the prefill chunks, sequence by sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.types import Levels, Phase


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where each row's keys and values go and which earlier ones it sees. N sequences, T rows."""

    num_decodes: int  # the first num_decodes sequences have one row each
    query_lens: tuple[int, ...]  # N rows per sequence
    context_lens: tuple[int, ...]  # N tokens with KV after this step, the new ones included
    context_lens_dev: Tensor  # [N] int64
    block_table: Tensor  # [N, max_blocks] int64, padded with block 0
    slot_mapping: Tensor  # [T] int64, block * block_size + offset of each row's KV


@dataclass(frozen=True, slots=True)
class RowInfo:
    """What the dimmer knows of each row. ``levels`` is a tensor: a new level needs no new code path."""

    phase: Tensor  # [T] int64, engine.types.Phase
    exact: Tensor  # [T] bool: the request refuses to be dimmed
    levels: Tensor  # [2] int64, brownout level of each phase


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    attention: AttentionMetadata
    rows: RowInfo
    sequence_of_row: Tensor  # [T] int64
    sample_rows: Tensor  # [N'] int64, rows whose next token is wanted


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    logits: Tensor  # [N', V] float32
    dimmed_pairs: Tensor  # [T] int64: pairs of the row, over all layers, served by a united expert


class BatchBuilder:
    """Collects sequences on the host, then copies the step's inputs to the device. Add decode rows first."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._num_decodes = 0
        self._query_lens: list[int] = []
        self._context_lens: list[int] = []
        self._tables: list[list[int]] = []
        self._token_ids: list[int] = []
        self._positions: list[int] = []
        self._slots: list[int] = []
        self._sequence_of_row: list[int] = []
        self._phase: list[int] = []
        self._exact: list[bool] = []
        self._sample_rows: list[int] = []

    def add(
        self, token_ids: list[int], start: int, block_ids: list[int], phase: Phase, exact: bool, samples: bool
    ) -> None:
        """Rows for the tokens at positions [start, start + len(token_ids)) of one sequence."""
        size, end = self._block_size, start + len(token_ids)
        self._num_decodes += phase is Phase.DECODE
        self._sequence_of_row += [len(self._query_lens)] * len(token_ids)
        self._query_lens.append(len(token_ids))
        self._context_lens.append(end)
        self._tables.append(block_ids[: -(-end // size)])
        self._token_ids += token_ids
        self._positions += range(start, end)
        self._slots += [block_ids[p // size] * size + p % size for p in range(start, end)]
        self._phase += [int(phase)] * len(token_ids)
        self._exact += [exact] * len(token_ids)
        if samples:
            self._sample_rows.append(len(self._token_ids) - 1)

    def build(self, levels: Levels, device: torch.device) -> ForwardBatch:
        width = max(map(len, self._tables))

        def ints(values: list[int] | list[list[int]]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return ForwardBatch(
            token_ids=ints(self._token_ids),
            positions=ints(self._positions),
            attention=AttentionMetadata(
                num_decodes=self._num_decodes,
                query_lens=tuple(self._query_lens),
                context_lens=tuple(self._context_lens),
                context_lens_dev=ints(self._context_lens),
                block_table=ints([table + [0] * (width - len(table)) for table in self._tables]),
                slot_mapping=ints(self._slots),
            ),
            rows=RowInfo(
                phase=ints(self._phase),
                exact=torch.tensor(self._exact, dtype=torch.bool, device=device),
                levels=ints([levels.prefill, levels.decode]),
            ),
            sequence_of_row=ints(self._sequence_of_row),
            sample_rows=ints(self._sample_rows),
        )
