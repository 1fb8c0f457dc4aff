"""Runs a scheduled batch: builds the step's tensors, calls the model, samples. Knows tensors, not policy."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from engine.batch import BatchBuilder
from engine.kv_cache.blocks import BlockManager
from engine.pool.slots import ModelSlot
from engine.sampling import SamplingState, sample
from engine.scheduler.scheduler import ScheduledBatch
from engine.types import Levels, Phase, TokenLogprob


@dataclass(frozen=True, slots=True)
class StepResult:
    """Per scheduled sequence, in the batch's order. ``token_ids`` has None where nothing was sampled."""

    token_ids: list[int | None]
    logprobs: list[TokenLogprob | None]
    dimmed_pairs: list[int]
    step_time_s: float


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
        builder = BatchBuilder(self.slot.kv.block_size)
        sampled_at: list[int] = []
        sampling_states: list[SamplingState] = []
        for index, item in enumerate(batch):
            sequence = item.sequence
            start = sequence.num_computed
            tokens = sequence.token_ids[start : start + item.num_tokens]
            table = blocks.block_ids(sequence.request_id)
            builder.add(tokens, start, table, item.phase, sequence.exact, item.samples)
            if item.samples:
                sampled_at.append(index)
                sampling_states.append(states[sequence.request_id])
        inputs = builder.build(levels, self.slot.device)
        output = self.slot.model.forward(inputs, self.slot.kv)
        dimmed_pairs = torch.zeros(len(batch), dtype=torch.int64, device=self.slot.device)
        dimmed_pairs.index_add_(0, inputs.sequence_of_row, output.dimmed_pairs)

        token_ids: list[int | None] = [None] * len(batch)
        logprobs: list[TokenLogprob | None] = [None] * len(batch)
        if sampled_at:
            sampled = sample(output.logits, sampling_states)
            for index, token_id, logprob in zip(sampled_at, sampled.token_ids, sampled.logprobs, strict=True):
                token_ids[index], logprobs[index] = token_id, logprob
        return StepResult(token_ids, logprobs, dimmed_pairs.tolist(), time.perf_counter() - start_s)

    @torch.inference_mode()
    def time_step(self, num_tokens: int, level: int, seed: int) -> float:
        """Seconds for a step of ``num_tokens`` decode rows with random tokens at ``level``; overwrites KV blocks.

        Each row has a block of its own: rows that share one would see the same context and route alike.
        """
        generator = torch.Generator().manual_seed(seed)
        builder = BatchBuilder(self.slot.kv.block_size)
        token_ids = torch.randint(self.slot.spec.vocab_size, (num_tokens,), generator=generator).tolist()
        for row, token_id in enumerate(token_ids):
            block_id = row % self.slot.kv.num_blocks
            builder.add([token_id], 0, [block_id], Phase.DECODE, exact=False, samples=True)
        start_s = time.perf_counter()
        inputs = builder.build(Levels(level, level), self.slot.device)
        self.slot.model.forward(inputs, self.slot.kv).logits.argmax(dim=-1).tolist()
        return time.perf_counter() - start_s
