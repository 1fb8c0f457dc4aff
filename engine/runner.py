"""Runs a scheduled batch: builds the step's inputs, calls the model, samples. Knows tensors, not policy."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.batch import StepRows, to_device
from engine.kv_cache.blocks import BlockManager
from engine.places import Places
from engine.pool.slots import ModelSlot
from engine.sampling.choose import Choice, Sampled, choose
from engine.sampling.logprobs import LogitRows, take_prompt_rows
from engine.sampling.state import SamplingState
from engine.scheduler.scheduler import ScheduledBatch
from engine.transfer import send
from engine.types import Levels, TokenLogprob


@dataclass(frozen=True, slots=True)
class StepResult:
    """Per scheduled sequence, in the batch's order. ``token_ids`` has None where nothing was sampled."""

    token_ids: list[int | None]
    logprobs: list[TokenLogprob | None]
    dimmed_pairs: list[int]
    step_time_s: float  # since it was launched or, if that was later, since the step before it ended


@dataclass(frozen=True, slots=True)
class Computed:
    """A step's choices: of the sequences that sample, and of all of them."""

    sampled: Sampled
    dimmed_pairs: list[int]


class LaunchedStep:
    """A step on its way."""

    def __init__(self, runner: Runner, samples: np.ndarray, launched_s: float, wait: Callable[[], Computed]) -> None:
        self._runner = runner
        self._samples = samples
        self._launched_s = launched_s
        self._wait = wait

    def wait(self) -> StepResult:
        """Block until it has ended."""
        computed = self._wait()
        token_ids: list[int | None] = [None] * len(self._samples)
        logprobs: list[TokenLogprob | None] = [None] * len(self._samples)
        chosen = zip(computed.sampled.token_ids, computed.sampled.logprobs, strict=True)
        for index, (token_id, logprob) in zip(np.flatnonzero(self._samples).tolist(), chosen, strict=True):
            token_ids[index], logprobs[index] = token_id, logprob
        step_time_s = self._runner.time_since_s(self._launched_s)
        return StepResult(token_ids, logprobs, computed.dimmed_pairs, step_time_s)


class Runner:
    """Runs steps on one slot, in the order in which they are launched."""

    def __init__(self, slot: ModelSlot, max_num_seqs: int) -> None:
        self.slot = slot
        self._places = Places(max_num_seqs, -(-slot.max_model_len // slot.kv.block_size), slot.kv.block_size)
        self._newest = torch.zeros(max_num_seqs, dtype=torch.int64, device=slot.device)
        self._last_ended_s = 0.0

    @torch.inference_mode()
    def launch(
        self, batch: ScheduledBatch, blocks: BlockManager, levels: Levels, states: Sequence[SamplingState]
    ) -> LaunchedStep:
        """Begin to compute the batch at ``levels``; ``states`` are its sequences', in order.

        Steps launched earlier may still be under way; what they choose is read on the device.
        """
        launched_s = time.perf_counter()
        sampling = [state for state, item in zip(states, batch, strict=True) if item.samples]
        logits = None
        if any(state.prompt_logprobs is not None for state in states):
            logits = [state.logit_rows(item) for state, item in zip(states, batch, strict=True)]
        rows = self._places.rows(batch, blocks, [rows.num_rows for rows in logits] if logits else None)
        levels = self.slot.ladder.resolve(levels, rows.num_rows)
        run = self._run_on_graphs if self.slot.graphs else self._run_eagerly
        return LaunchedStep(self, rows.samples, launched_s, run(rows, levels, sampling, logits))

    def time_since_s(self, launched_s: float) -> float:
        """Seconds of the step that just ended; the next one is counted from now at the earliest."""
        now_s = time.perf_counter()
        step_time_s = now_s - max(launched_s, self._last_ended_s)
        self._last_ended_s = now_s
        return step_time_s

    def _run_eagerly(
        self, rows: StepRows, levels: Levels, sampling: Sequence[SamplingState], logit_rows: Sequence[LogitRows] | None
    ) -> Callable[[], Computed]:
        device = self.slot.device
        inputs = to_device(rows, self.slot.kv.block_size, levels, device, self._newest)
        output = self.slot.model.forward(inputs, self.slot.kv)
        if self.slot.counter is not None:
            self.slot.counter.end_step_()
        dimmed_pairs = torch.zeros(len(rows.places), dtype=torch.int64, device=device)
        dimmed_pairs.index_add_(0, inputs.sequence_of_row, output.dimmed_pairs)
        places, sample_rows = (send(array, device) for array in (rows.places[rows.samples], rows.sample_rows))
        choice = _choose(output.logits, sampling, logit_rows, inputs.token_ids[sample_rows])
        self._newest[places] = choice.token_ids
        token_ids = choice.token_ids.tolist()
        computed = Computed(Sampled(token_ids, choice.logprobs(token_ids)), dimmed_pairs.tolist())
        return lambda: computed

    def _run_on_graphs(
        self, rows: StepRows, levels: Levels, sampling: Sequence[SamplingState], logit_rows: Sequence[LogitRows] | None
    ) -> Callable[[], Computed]:
        graphs = self.slot.graphs
        assert graphs is not None
        if self.slot.counter is not None:
            self.slot.counter.note_step()
        if logit_rows is None and all(state.takes_argmax for state in sampling):
            step = graphs.launch(rows, levels)
            for state in sampling:
                if not state.always_argmax:
                    state.begin()
            return lambda: Computed(Sampled(step.token_ids(), [None] * len(sampling)), step.dimmed_pairs())
        choices: list[Choice] = []

        def choose_tokens(logits: Tensor, newest: Tensor) -> Tensor:
            choices.append(_choose(logits, sampling, logit_rows, newest))
            return choices[0].token_ids

        step = graphs.launch(rows, levels, choose_tokens)

        def wait() -> Computed:
            token_ids = step.token_ids()
            return Computed(Sampled(token_ids, choices[0].logprobs(token_ids)), step.dimmed_pairs())

        return wait

    @torch.inference_mode()
    def time_step(self, num_tokens: int, level: int, seed: int) -> float:
        """Seconds for a step of ``num_tokens`` decode rows with random tokens at ``level``; overwrites KV blocks.

        Each row has a block of its own: rows that share one would see the same context and route alike.
        """
        slot, rng = self.slot, np.random.default_rng(seed)
        token_ids = rng.integers(slot.spec.vocab_size, size=num_tokens)
        tables = np.arange(num_tokens, dtype=np.int32)[:, None] % slot.kv.num_blocks
        rows = StepRows.decodes(token_ids, np.zeros(num_tokens, dtype=np.int64), tables)
        levels = slot.ladder.resolve(Levels(level, level), num_tokens)
        start_s = time.perf_counter()
        if slot.graphs is not None and num_tokens <= slot.graphs.max_num_seqs:
            slot.graphs.launch(rows, levels).token_ids()
        else:
            inputs = to_device(rows, slot.kv.block_size, levels, slot.device)
            slot.model.forward(inputs, slot.kv).logits.argmax(dim=-1).tolist()
        return time.perf_counter() - start_s


def _choose(
    logits: Tensor, sampling: Sequence[SamplingState], logit_rows: Sequence[LogitRows] | None, newest: Tensor
) -> Choice:
    if logit_rows is not None:
        logits = take_prompt_rows(logits, logit_rows)
    return choose(logits.float(), sampling, newest)
