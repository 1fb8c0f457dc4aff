"""CUDA graphs of the decode step, one for each of a few batch sizes; a batch is padded to the next.

Everything that changes between steps, the brownout levels included, is read from static buffers, so a graph is captured
once. Padding rows write their KV to block 0 and get no expert.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.batch import AttentionMetadata, DecodeOutput, DecodeRow, ForwardBatch, RowInfo
from engine.kv_cache.storage import KvStorage
from engine.layers.fused import argmax
from engine.models.decoder import Decoder
from engine.types import Levels, Phase

logger = logging.getLogger(__name__)

BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
TOKEN_ID, POSITION, CONTEXT_LEN, SLOT, EXACT, VALID = range(6)  # rows of the scalar inputs


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits: Tensor  # [size, V]
    results: Tensor  # [2, size] int64: greedy token, dimmed pairs
    host_results: Tensor  # the same in pinned memory, written by the graph


class DecodeGraphs:
    """Captured at start for batches of up to ``max_batch`` sequences; larger batches run without a graph."""

    def __init__(self, model: Decoder, kv: KvStorage, max_model_len: int, max_batch: int, device: torch.device) -> None:
        self._model, self._kv = model, kv
        sizes = [size for size in BATCH_SIZES if size < max_batch]
        self._sizes = [*sizes, min(max_batch, BATCH_SIZES[-1])]
        self.max_batch = self._sizes[-1]
        width = -(-max_model_len // kv.block_size)
        self._host_scalars, self._scalars = _twin_buffers((6, self.max_batch), device)
        self._host_levels, self._levels = _twin_buffers((2,), device)
        self._host_table, self._table = _twin_buffers((self.max_batch, width), device)
        self._phase = torch.full((self.max_batch,), int(Phase.DECODE), dtype=torch.int32, device=device)
        self._row_numbers = torch.arange(self.max_batch, device=device)
        self._done = torch.cuda.Event()
        self._scalars[CONTEXT_LEN] = 1
        started_s = time.perf_counter()
        pool = torch.cuda.graph_pool_handle()
        self._captured = {size: self._capture(size, pool) for size in reversed(self._sizes)}
        logger.info("%d decode graphs captured in %.1f s", len(self._sizes), time.perf_counter() - started_s)

    @torch.inference_mode()
    def run(self, rows: Sequence[DecodeRow], levels: Levels) -> DecodeOutput:
        """One decode step of at most ``max_batch`` sequences."""
        size = self.size_of(len(rows))
        self._fill(rows, levels, size)
        captured = self._captured[size]
        captured.graph.replay()
        self._done.record()
        self._done.synchronize()
        token_ids, dimmed_pairs = captured.host_results[:, : len(rows)].tolist()
        return DecodeOutput(token_ids, dimmed_pairs, captured.logits[: len(rows)])

    def replay(self, size: int) -> None:
        """Run the graph of ``size`` rows again on the inputs of the last run, without waiting: for measurements."""
        self._captured[size].graph.replay()

    def size_of(self, num_rows: int) -> int:
        """The batch size that ``num_rows`` rows are padded to."""
        return next(size for size in self._sizes if size >= num_rows)

    def _fill(self, rows: Sequence[DecodeRow], levels: Levels, size: int) -> None:
        num_rows, block_size = len(rows), self._kv.block_size
        positions = [row.position for row in rows]
        slots = [
            row.block_ids[p // block_size] * block_size + p % block_size for row, p in zip(rows, positions, strict=True)
        ]
        scalars = self._host_scalars.numpy()
        scalars[:, num_rows:size] = 0
        scalars[CONTEXT_LEN, num_rows:size] = 1
        scalars[TOKEN_ID, :num_rows] = [row.token_id for row in rows]
        scalars[POSITION, :num_rows] = positions
        scalars[CONTEXT_LEN, :num_rows] = [p + 1 for p in positions]
        scalars[SLOT, :num_rows] = slots
        scalars[EXACT, :num_rows] = [row.exact for row in rows]
        scalars[VALID, :num_rows] = 1
        table = self._host_table.numpy()
        for index, row in enumerate(rows):
            table[index, : len(row.block_ids)] = row.block_ids
        self._host_levels.numpy()[:] = levels.prefill, levels.decode
        self._scalars.copy_(self._host_scalars, non_blocking=True)
        self._levels.copy_(self._host_levels, non_blocking=True)
        self._table[:num_rows].copy_(self._host_table[:num_rows], non_blocking=True)

    def _batch(self, size: int) -> ForwardBatch:
        """The static inputs of ``size`` rows."""
        scalars = self._scalars[:, :size]
        return ForwardBatch(
            token_ids=scalars[TOKEN_ID],
            positions=scalars[POSITION],
            attention=AttentionMetadata(
                num_decodes=size,
                query_lens=(1,) * size,
                context_lens=(),
                prefill_starts_dev=self._levels[:0],
                context_lens_dev=scalars[CONTEXT_LEN],
                block_table=self._table[:size],
                slot_mapping=scalars[SLOT],
            ),
            rows=RowInfo(self._phase[:size], scalars[EXACT], scalars[VALID], self._levels),
            sequence_of_row=self._phase[:0],
            sample_rows=self._row_numbers[:size],
        )

    @torch.inference_mode()
    def _capture(self, size: int, pool: Any) -> _Captured:
        batch = self._batch(size)
        host_results = torch.zeros(2, size, dtype=torch.int64, pin_memory=True)
        stream = torch.cuda.Stream(priority=-1)  # small kernels of the main chain go before the shared expert's
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._compute(batch)  # compiles the kernels
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            logits, results = self._compute(batch)
            host_results.copy_(results, non_blocking=True)
        return _Captured(graph, logits, results, host_results)

    def _compute(self, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        output = self._model.forward(batch, self._kv)
        return output.logits, torch.stack((argmax(output.logits), output.dimmed_pairs.long()))


def _twin_buffers(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Zeros of int32 in pinned host memory and on the device."""
    host = torch.zeros(shape, dtype=torch.int32, pin_memory=True)
    return host, host.to(device)
