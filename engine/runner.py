"""Runs a scheduled batch: builds the step's tensors, calls the model, samples. Knows tensors, not policy."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.batch import BatchBuilder, DecodeRow
from engine.kv_cache.blocks import BlockManager
from engine.logprobs import take_prompt_rows
from engine.pool.slots import ModelSlot
from engine.sampling import Sampled, SamplingState, sample
from engine.scheduler.scheduler import ScheduledBatch
from engine.types import Levels, Phase, TokenLogprob

if TYPE_CHECKING:
    from engine.graphs import DecodeGraphs


@dataclass(frozen=True, slots=True)
class StepResult:
    """Per scheduled sequence, in the batch's order. ``token_ids`` has None where nothing was sampled."""

    token_ids: list[int | None]
    logprobs: list[TokenLogprob | None]
    dimmed_pairs: list[int]
    step_time_s: float


@dataclass(frozen=True, slots=True)
class _Computed:
    sampled: Sampled  # of the sequences that sample
    dimmed_pairs: list[int]


class Runner:
    """Stateless but for the slot it was given."""

    def __init__(self, slot: ModelSlot) -> None:
        self.slot = slot

    @torch.inference_mode()
    def run(
        self, batch: ScheduledBatch, blocks: BlockManager, levels: Levels, states: dict[str, SamplingState]
    ) -> StepResult:
        """Compute the batch at ``levels``; ``states`` maps request ids to sampling states."""
        start_s = time.perf_counter()
        graphs = self.slot.graphs
        if graphs is not None and not batch.prefills and len(batch) <= graphs.max_batch:
            computed = self._run_graph(graphs, batch, blocks, levels, states)
        else:
            computed = self._run_eagerly(batch, blocks, levels, states)
        if self.slot.counter is not None:
            self.slot.counter.end_step_()
        token_ids: list[int | None] = [None] * len(batch)
        logprobs: list[TokenLogprob | None] = [None] * len(batch)
        sampled_at = [index for index, item in enumerate(batch) if item.samples]
        for index, token_id, logprob in zip(
            sampled_at, computed.sampled.token_ids, computed.sampled.logprobs, strict=True
        ):
            token_ids[index], logprobs[index] = token_id, logprob
        return StepResult(token_ids, logprobs, computed.dimmed_pairs, time.perf_counter() - start_s)

    def _run_eagerly(
        self, batch: ScheduledBatch, blocks: BlockManager, levels: Levels, states: dict[str, SamplingState]
    ) -> _Computed:
        builder = BatchBuilder(self.slot.kv.block_size)
        logit_rows = [states[item.sequence.request_id].logit_rows(item) for item in batch]
        for item, rows in zip(batch, logit_rows, strict=True):
            sequence = item.sequence
            start = sequence.num_computed
            tokens = sequence.token_ids[start : start + item.num_tokens]
            table = blocks.block_ids(sequence.request_id)
            builder.add(tokens, start, table, item.phase, sequence.exact, rows.num_rows)
        inputs = builder.build(levels, self.slot.device)
        output = self.slot.model.forward(inputs, self.slot.kv)
        dimmed_pairs = torch.zeros(len(batch), dtype=torch.int64, device=self.slot.device)
        dimmed_pairs.index_add_(0, inputs.sequence_of_row, output.dimmed_pairs)
        sampling = [states[item.sequence.request_id] for item in batch if item.samples]
        logits = take_prompt_rows(output.logits, logit_rows)
        sampled = sample(logits.float(), sampling) if sampling else Sampled([], [])
        return _Computed(sampled, dimmed_pairs.tolist())

    def _run_graph(
        self,
        graphs: DecodeGraphs,
        batch: ScheduledBatch,
        blocks: BlockManager,
        levels: Levels,
        states: dict[str, SamplingState],
    ) -> _Computed:
        rows = []
        for item in batch:
            sequence = item.sequence
            position = sequence.num_computed
            block_ids = blocks.block_ids(sequence.request_id)
            rows.append(DecodeRow(sequence.token_ids[position], position, block_ids, sequence.exact))
        output = graphs.run(rows, levels)
        sampling = [states[item.sequence.request_id] for item in batch]
        if all(state.takes_argmax for state in sampling):
            return _Computed(Sampled(output.token_ids, [None] * len(rows)), output.dimmed_pairs)
        return _Computed(sample(output.logits.float(), sampling), output.dimmed_pairs)

    @torch.inference_mode()
    def time_step(self, num_tokens: int, level: int, seed: int) -> float:
        """Seconds for a step of ``num_tokens`` decode rows with random tokens at ``level``; overwrites KV blocks.

        Each row has a block of its own: rows that share one would see the same context and route alike.
        """
        generator = torch.Generator().manual_seed(seed)
        token_ids = torch.randint(self.slot.spec.vocab_size, (num_tokens,), generator=generator).tolist()
        rows = [DecodeRow(t, 0, [i % self.slot.kv.num_blocks], exact=False) for i, t in enumerate(token_ids)]
        levels, graphs = Levels(level, level), self.slot.graphs
        start_s = time.perf_counter()
        if graphs is not None and num_tokens <= graphs.max_batch:
            graphs.run(rows, levels)
        else:
            builder = BatchBuilder(self.slot.kv.block_size)
            for row in rows:
                builder.add([row.token_id], row.position, row.block_ids, Phase.DECODE, row.exact, samples=1)
            inputs = builder.build(levels, self.slot.device)
            self.slot.model.forward(inputs, self.slot.kv).logits.argmax(dim=-1).tolist()
        return time.perf_counter() - start_s
