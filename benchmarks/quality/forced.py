"""The engine's model with the tokens given: what dimming changes in its predictions, at one setting and step size.

A decode-like step of batch B takes one token from each of B different sequences; a prefill step takes whole sequences,
up to 2,048 tokens. All positions are dimmed. Steps run the serving path's own batches, kernels and graphs.

Legend: S sequences, T tokens each, B sequences in a step, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.scoring import Request
from engine.batch import StepRows, to_device
from engine.moe.layer import MoeLayer
from engine.pool.slots import ModelSlot
from engine.types import Levels

PREFILL_TOKENS = 2048
NUM_COUNTED_STEPS = 8


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """Logits of one step: row n is for the token after ``positions[n]`` of sequence ``sequences[n]``."""

    sequences: np.ndarray  # [N]
    positions: np.ndarray  # [N]
    logits: Tensor  # [N, V]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Against level 0, per token, in nats; the standard error is that over sequences.

    ``agreement``: how often the likeliest token is the same.
    """

    dnll: float
    se: float
    kl: float
    agreement: float


@dataclass(frozen=True, slots=True)
class Reference:
    """The undimmed model's predictions of sequences [S, T]."""

    logits: Tensor  # [S, T - 1, V]
    nll: Tensor  # [S, T - 1] float32


class ForcedModel:
    """``max_batch`` sequences of at most ``max_tokens`` are computed at once; the slot's KV must hold them."""

    def __init__(self, slot: ModelSlot, max_batch: int, max_tokens: int) -> None:
        self.slot = slot
        self._num_blocks = -(-max_tokens // slot.kv.block_size)
        needed = max(max_batch * self._num_blocks, PREFILL_TOKENS // slot.kv.block_size + PREFILL_TOKENS // 8) + 1
        if slot.kv.num_blocks < needed:
            raise SystemExit(
                f"the KV cache has {slot.kv.num_blocks} blocks; {needed} are needed: raise cache.num_blocks"
            )

    def steps(self, sequences: Sequence[Sequence[int]], setting: int, batch: int | None) -> Iterator[Predictions]:
        """Predictions for every position but each sequence's last. ``batch`` None: prefill steps."""
        return self._prefill(sequences, setting) if batch is None else self._decode(sequences, setting, batch)

    @torch.inference_mode()
    def _decode(self, sequences: Sequence[Sequence[int]], setting: int, batch: int) -> Iterator[Predictions]:
        levels = Levels(setting, setting)
        waiting = iter(range(len(sequences)))
        lanes: list[tuple[int, int] | None] = [None] * batch  # (sequence, position)
        while True:
            for lane, at in enumerate(lanes):
                if at is None:
                    following = next(waiting, None)
                    lanes[lane] = None if following is None else (following, 0)
            active = [(lane, *at) for lane, at in enumerate(lanes) if at is not None]
            if not active:
                return
            lane_ids, sequence_ids, positions = (np.array(column) for column in zip(*active, strict=True))
            token_ids = np.array([sequences[s][p] for _, s, p in active])
            rows = StepRows.decodes(token_ids, positions, self._tables(lane_ids))
            yield Predictions(sequence_ids, positions, self._logits(rows, levels))
            for lane, sequence, position in active:
                lanes[lane] = (sequence, position + 1) if position + 2 < len(sequences[sequence]) else None

    def _logits(self, rows: StepRows, levels: Levels) -> Tensor:
        graphs = self.slot.graphs
        if graphs is not None and len(rows.places) <= graphs.max_num_seqs:
            step = graphs.launch(rows, levels)
            step.token_ids()  # wait: the next launch writes to the same buffers
            return step.logits
        inputs = to_device(rows, self.slot.kv.block_size, levels, self.slot.device)
        return self.slot.model.forward(inputs, self.slot.kv).logits

    def _tables(self, lanes: np.ndarray) -> np.ndarray:
        """[N, blocks]: each lane has blocks of its own; block 0 is scratch."""
        tables: np.ndarray = (1 + lanes[:, None] * self._num_blocks + np.arange(self._num_blocks)).astype(np.int32)
        return tables

    @torch.inference_mode()
    def _prefill(self, sequences: Sequence[Sequence[int]], setting: int) -> Iterator[Predictions]:
        start = 0
        while start < len(sequences):
            end, num_tokens = start, 0
            while end < len(sequences) and (end == start or num_tokens + len(sequences[end]) <= PREFILL_TOKENS):
                num_tokens += len(sequences[end])
                end += 1
            part = sequences[start:end]
            lengths = np.array([len(ids) for ids in part])
            inputs = to_device(
                self._prompts(part, lengths), self.slot.kv.block_size, Levels(setting, setting), self.slot.device
            )
            logits = self.slot.model.forward(inputs, self.slot.kv).logits
            kept = np.concatenate([np.arange(length) < length - 1 for length in lengths])
            numbers = np.repeat(np.arange(start, end), lengths)[kept]
            positions = np.concatenate([np.arange(length - 1) for length in lengths])
            yield Predictions(numbers, positions, logits[torch.from_numpy(kept).to(logits.device)])
            start = end

    def _prompts(self, sequences: Sequence[Sequence[int]], lengths: np.ndarray) -> StepRows:
        num_blocks = -(-lengths // self.slot.kv.block_size)
        tables = np.zeros((len(lengths), num_blocks.max()), dtype=np.int32)
        first = 1
        for row, count in zip(tables, num_blocks, strict=True):
            row[:count] = np.arange(first, first + count)
            first += count
        ones = np.ones(len(lengths), dtype=int)
        return StepRows(
            num_decodes=0, places=np.arange(len(lengths)), starts=0 * ones, counts=lengths, samples=ones > 0,
            num_logits=lengths, exact=ones == 0, tables=tables,
            token_ids=np.concatenate([np.asarray(ids) for ids in sequences]),
        )  # fmt: skip

    # What is measured

    def reference(self, sequences: Tensor, batch: int | None) -> Reference:
        """The undimmed predictions of sequences [S, T]."""
        logits = nll = None
        for step in self.steps(sequences.tolist(), 0, batch):
            if logits is None or nll is None:
                shape = (sequences.shape[0], sequences.shape[1] - 1)
                logits = step.logits.new_empty(*shape, step.logits.shape[1])
                nll = torch.empty(shape, device=step.logits.device)
            at = _indices(step, logits.device)
            logits[at] = step.logits
            nll[at] = _nll(step, sequences)
        assert logits is not None and nll is not None
        return Reference(logits, nll)

    def compare(self, sequences: Tensor, setting: int, batch: int | None, reference: Reference) -> Comparison:
        """What the setting changes. sequences [S, T], those of the reference."""
        nll, kl, same = (torch.empty_like(reference.nll) for _ in range(3))
        for step in self.steps(sequences.tolist(), setting, batch):
            at = _indices(step, nll.device)
            exact = reference.logits[at].float().log_softmax(dim=1)
            dimmed = step.logits.float().log_softmax(dim=1)
            kl[at] = (exact.exp() * (exact - dimmed)).sum(dim=1)
            same[at] = (exact.argmax(dim=1) == dimmed.argmax(dim=1)).float()
            nll[at] = _nll(step, sequences)
        per_sequence = (nll - reference.nll).mean(dim=1)
        return Comparison(
            dnll=float(per_sequence.mean()),
            se=float(per_sequence.std() / len(per_sequence) ** 0.5),
            kl=float(kl.mean()),
            agreement=float(same.mean()),
        )

    @torch.inference_mode()
    def distinct_experts(self, sequences: Tensor, setting: int, batch: int | None) -> float:
        """Mean over steps and layers that can be dimmed of the experts that a step reads."""
        counter = _ExpertCounter(self.slot)
        with counter:
            if batch is None:
                for _ in self._prefill(sequences[: PREFILL_TOKENS // sequences.shape[1]].tolist(), setting):
                    pass
                return counter.mean()
            lanes = np.arange(min(batch, len(sequences)))
            part, half = sequences[: len(lanes)], sequences.shape[1] // 2
            tables = self._tables(lanes)
            block_size, device, kv = self.slot.kv.block_size, self.slot.device, self.slot.kv
            for position in range(half + NUM_COUNTED_STEPS):
                rows = StepRows.decodes(part[:, position].numpy(), np.full(len(lanes), position), tables)
                counter.counts_now = position >= half
                self.slot.model.forward(to_device(rows, block_size, Levels(setting, setting), device), kv)
        return counter.mean()


class ForcedScorer:
    """Log-likelihoods at one setting and step size; part of `scoring.Scorer`, all that tasks need."""

    def __init__(self, forced: ForcedModel, setting: int, batch: int | None) -> None:
        self._forced, self._setting, self._batch = forced, setting, batch

    def score(self, requests: Sequence[Request]) -> list[float]:
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].ids))
        scores = torch.zeros(len(requests), device=self._forced.slot.device)
        starts = np.array([requests[index].start for index in order])
        for step in self._forced.steps([requests[i].ids for i in order], self._setting, self._batch):
            following = [requests[order[s]].ids[p + 1] for s, p in zip(step.sequences, step.positions, strict=True)]
            wanted = torch.tensor(following, device=scores.device)
            logprobs = step.logits.float().log_softmax(dim=1).gather(1, wanted[:, None])[:, 0]
            counted = torch.from_numpy(step.positions + 1 >= starts[step.sequences]).to(scores.device)
            scores.index_add_(
                0, torch.from_numpy(step.sequences).to(scores.device), torch.where(counted, logprobs, 0.0)
            )
        by_rank = scores.tolist()
        result = [0.0] * len(requests)
        for rank, index in enumerate(order):
            result[index] = by_rank[rank]
        return result


class _ExpertCounter:
    """While it is open, counts the distinct packed experts of every dimmable layer's routing."""

    def __init__(self, slot: ModelSlot) -> None:
        self._layers = [layer for layer in slot.model.layers if isinstance(layer.feed_forward, MoeLayer)]
        self._total = torch.zeros((), dtype=torch.int64, device=slot.device)
        self._num_counted = 0
        self.counts_now = True

    def __enter__(self) -> None:
        for layer in self._layers:
            if layer.moe.dimmer is not None:
                layer.feed_forward = _Counted(layer.moe, self)  # type: ignore[assignment]

    def __exit__(self, *error: object) -> None:
        for layer in self._layers:
            if isinstance(layer.feed_forward, _Counted):
                layer.feed_forward = layer.feed_forward.moe

    def count(self, ids: Tensor, num_packed: int) -> None:
        used = torch.zeros(num_packed + 1, dtype=torch.int64, device=ids.device).index_fill_(0, ids.flatten(), 1)
        self._total += used[:num_packed].sum()
        self._num_counted += 1

    def mean(self) -> float:
        return float(self._total) / max(1, self._num_counted)


class _Counted:
    def __init__(self, moe: MoeLayer, counter: _ExpertCounter) -> None:
        self.moe, self._counter = moe, counter

    def __call__(self, x: Tensor, rows: Any, dimmed_pairs: Tensor) -> Tensor:
        dimmer = self.moe.dimmer
        assert dimmer is not None
        if self._counter.counts_now:
            routing = dimmer.rewrite(self.moe.index, self.moe.gate(x), rows).routing
            self._counter.count(routing.ids, len(self.moe.experts.gate_up))
        return self.moe(x, rows, dimmed_pairs)


def _indices(step: Predictions, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(step.sequences).to(device), torch.from_numpy(step.positions).to(device)


def _nll(step: Predictions, sequences: Tensor) -> Tensor:
    """[N] nats"""
    following = sequences[step.sequences, step.positions + 1].to(step.logits.device)
    return -step.logits.float().log_softmax(dim=1).gather(1, following[:, None])[:, 0]
