"""Continuous batching with chunked prefill in one token budget. Pure: no torch, no clock.

A step takes, in this order, until the token budget is spent:

1. every decoding sequence, one token each;
2. running sequences whose prompt is not computed yet, oldest first, as large a chunk as fits;
3. waiting sequences, by priority, then oldest first, while there is a place in the batch and blocks for all their
   tokens.

Prompts whose own log-probabilities are wanted share another budget besides: a row of logits takes several times the
memory of a token's other activations.

With ``deadline_s`` those that can no longer have their first token in time wait behind those that can; with
``shed_after_s`` a request that would wait too long is refused on arrival.

When blocks run out, the latest arrival is preempted: it loses its blocks, returns to the head of the queue and
recomputes (its own blocks are likely still in the prefix cache).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from engine.config import SchedulerConfig
from engine.kv_cache.blocks import BlockManager
from engine.scheduler.admission import check_queue, check_request, check_wait, has_room
from engine.scheduler.pace import PromptPace
from engine.scheduler.preempt import choose_victim
from engine.scheduler.queue import WaitingQueue
from engine.scheduler.sequence import Sequence
from engine.types import Levels, Phase

MAX_PASSED_OVER = 10  # deadlines that a relegated request may wait
MAX_PROMPT_LOGITS = 2048  # rows in one step of prompts whose own log-probabilities are wanted


class ScheduledSequence(NamedTuple):
    """What a step computes of one sequence. The sequence itself moves on while the step is under way."""

    sequence: Sequence
    start: int  # position of the first token to compute
    num_tokens: int
    phase: Phase
    samples: bool  # the step computes the sequence's newest token, so that the next one can be chosen
    admission: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


Chosen = dict[Sequence, ScheduledSequence]


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """Decoding sequences first, then prefill chunks."""

    decodes: tuple[ScheduledSequence, ...] = ()
    prefills: tuple[ScheduledSequence, ...] = ()
    num_preempted: int = 0

    def __iter__(self) -> Iterator[ScheduledSequence]:
        yield from self.decodes
        yield from self.prefills

    def __len__(self) -> int:
        return len(self.decodes) + len(self.prefills)

    @property
    def num_decode_tokens(self) -> int:
        return len(self.decodes)

    @property
    def num_prefill_tokens(self) -> int:
        return sum(item.num_tokens for item in self.prefills)

    @property
    def num_tokens(self) -> int:
        return self.num_decode_tokens + self.num_prefill_tokens


class Scheduler:
    """Owns the waiting queue, the running list and, through the block manager, the KV blocks."""

    def __init__(self, config: SchedulerConfig, blocks: BlockManager, max_model_len: int, vocab_size: int) -> None:
        self._config = config
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self.blocks = blocks
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # in order of admission
        self._free_places = list(range(config.max_num_seqs))
        self._num_admissions = 0
        self.pace = PromptPace()
        self.token_budget = config.chunk_tokens or config.max_num_batched_tokens  # of the next step

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def max_num_seqs(self) -> int:
        return self._config.max_num_seqs

    @property
    def num_free_slots(self) -> int:
        return self.max_num_seqs - len(self.running)

    @property
    def queued_prefill_tokens(self) -> int:
        """Prompt tokens still to compute, of waiting and of running sequences."""
        return self.waiting.num_tokens + sum(s.num_uncomputed for s in self.running if not s.decoding)

    def add(self, sequence: Sequence) -> None:
        """Raises InvalidRequestError or EngineBusyError; then nothing has changed."""
        check_request(sequence.request, self._max_model_len, self._vocab_size)
        check_queue(len(self.waiting), self._config.max_num_waiting)
        sequence.max_len = min(sequence.max_len, self._max_model_len)
        if self._config.shed_after_s is not None:
            tokens_ahead = self.queued_prefill_tokens - self.waiting.num_tokens + self.waiting.num_tokens_on_time
            check_wait(self.pace.ttft_s(tokens_ahead, sequence.num_uncomputed), self._config.shed_after_s)
        self.waiting.push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or aborted sequence and free its blocks at once."""
        if self.waiting.remove(sequence.request_id) is None:
            self._leave(sequence)

    def schedule(self, now_s: float) -> ScheduledBatch:
        """Choose the next step's work and reserve its blocks; `launch` says that the step was begun."""
        budget, logit_rows = self.token_budget, MAX_PROMPT_LOGITS
        num_running = len(self.running)
        self._order_queue(now_s)
        decodes: Chosen = {}
        prefills: Chosen = {}
        preempted: set[Sequence] = set()
        for sequence, decoding in self._unfinished():
            num_tokens = 1 if decoding else sequence.num_uncomputed
            num_tokens = num_tokens if num_tokens < budget else budget
            if not decoding and sequence.wants_prompt_logits:
                num_tokens = min(num_tokens, logit_rows)
                logit_rows -= num_tokens
            if num_tokens == 0 or sequence.place < 0:  # preempted by an older one
                continue
            end = sequence.num_computed + num_tokens
            if end > sequence.num_reserved:
                for victim in self._make_room(sequence, end):
                    preempted.add(victim)
                    taken_back = decodes.pop(victim, None) or prefills.pop(victim, None)
                    budget += taken_back.num_tokens if taken_back else 0
                if sequence in preempted:
                    continue
            budget -= num_tokens
            if decoding:
                decodes[sequence] = ScheduledSequence(
                    sequence, sequence.num_computed, 1, Phase.DECODE, True, sequence.admission
                )
            else:
                prefills[sequence] = _prefill(sequence, num_tokens)
        num_preempted = len(preempted)
        num_tokens_waiting = self.waiting.num_tokens
        if not num_preempted:
            self._admit(prefills, budget, logit_rows, now_s)
        batch = ScheduledBatch(tuple(decodes.values()), tuple(prefills.values()), num_preempted)
        num_admitted_tokens = num_tokens_waiting - self.waiting.num_tokens
        self.pace.note_step(
            now_s, num_running, batch.num_tokens, self.token_budget, num_admitted_tokens, bool(self.waiting)
        )
        return batch

    def _unfinished(self) -> list[tuple[Sequence, bool]]:
        """The running sequences that have something to compute, and whether they decode: those first, each by age."""
        decoding, prefilling = [], []
        for sequence in sorted(self.running, key=_arrival):
            if sequence.decoding:
                decoding.append((sequence, True))
            elif sequence.num_uncomputed:
                prefilling.append((sequence, False))
        return decoding + prefilling

    def launch(self, batch: ScheduledBatch) -> None:
        """The step has begun: the next one may be scheduled behind it, before its tokens are known."""
        for item in batch:
            item.sequence.num_computed = item.end
            item.sequence.num_pending += item.samples

    def commit(self, batch: ScheduledBatch, levels: Levels) -> None:
        """The step has run: its tokens have KV now, computed at ``levels``."""
        for items, level in ((batch.decodes, levels.decode), (batch.prefills, levels.prefill)):
            for item in items:
                sequence = item.sequence
                if sequence.admission == item.admission:  # else it ended or was preempted meanwhile
                    own_level = 0 if sequence.exact else level
                    end = item.start + item.num_tokens
                    self.blocks.commit(sequence.request_id, sequence.token_ids, end, own_level)

    def _order_queue(self, now_s: float) -> None:
        deadline_s = self._config.deadline_s
        if deadline_s is None or not self.waiting:
            return
        longest_s = MAX_PASSED_OVER * deadline_s

        def is_late(sequence: Sequence) -> bool:
            waited_s = now_s - sequence.arrival_s
            return deadline_s < waited_s + self.pace.compute_s(sequence.num_uncomputed) and waited_s < longest_s

        self.waiting.relegate(is_late)
        self.waiting.recall(lambda sequence: now_s - sequence.arrival_s >= longest_s)

    def _make_room(self, sequence: Sequence, num_tokens: int) -> list[Sequence]:
        """Reserve blocks for num_tokens tokens of a running sequence; returns whom that cost its place."""
        preempted: list[Sequence] = []
        while not self.blocks.reserve(sequence.request_id, num_tokens):
            victim = choose_victim(self.running)
            preempted.append(victim)
            self._leave(victim)
            victim.num_computed = 0
            self.waiting.push_front(victim)
            if victim is sequence:
                return preempted
        self._note_reserved(sequence, num_tokens)
        return preempted

    def _note_reserved(self, sequence: Sequence, num_tokens: int) -> None:
        sequence.num_reserved = -(-num_tokens // self.blocks.block_size) * self.blocks.block_size

    def _leave(self, sequence: Sequence) -> None:
        """A running sequence gives up its place and its blocks, which steps under way may still write to: whoever
        gets them next is computed after those."""
        self.running.remove(sequence)
        self.blocks.free(sequence.request_id)
        self._free_places.append(sequence.place)
        sequence.place, sequence.admission, sequence.num_reserved = -1, 0, 0

    def _admit(self, chosen: Chosen, budget: int, logit_rows: int, now_s: float) -> None:
        while self.waiting and budget > 0 and self.num_free_slots > 0:
            sequence = self.waiting.peek()
            if sequence.wants_prompt_logits and logit_rows == 0:
                break
            salt = sequence.request.cache_salt
            num_cached = self.blocks.start(sequence.request_id, sequence.reusable_ids, sequence.exact, salt)
            if not has_room(sequence, num_cached, self.blocks):
                self.blocks.free(sequence.request_id)
                break
            self.waiting.pop()
            sequence.num_computed = num_cached
            sequence.level_peak = max(sequence.level_peak, self.blocks.level(sequence.request_id))
            if sequence.admitted_s is None:
                sequence.admitted_s = now_s
                sequence.num_cached = num_cached
            num_tokens = min(sequence.num_uncomputed, budget)
            if sequence.wants_prompt_logits:
                num_tokens = min(num_tokens, logit_rows)
                logit_rows -= num_tokens
            self.blocks.reserve(sequence.request_id, num_cached + num_tokens)
            self._note_reserved(sequence, num_cached + num_tokens)
            self.running.append(sequence)
            self._num_admissions += 1
            sequence.place, sequence.admission = self._free_places.pop(), self._num_admissions
            budget -= num_tokens
            chosen[sequence] = _prefill(sequence, num_tokens)


_arrival = attrgetter("arrival_s")


def _prefill(sequence: Sequence, num_tokens: int) -> ScheduledSequence:
    samples = num_tokens == sequence.num_uncomputed
    return ScheduledSequence(sequence, sequence.num_computed, num_tokens, Phase.PREFILL, samples, sequence.admission)
