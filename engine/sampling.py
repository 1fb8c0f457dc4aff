"""Choosing tokens: logits [N, V] and one SamplingState per row in, one token per row out.

The order is vLLM's: log-probabilities of the raw logits; then logit_bias, the min_tokens mask, penalties, the
grammar's mask, temperature, min_p, top_k, top_p, and the draw. Nothing here costs a pass over the vocabulary per
request: all rows of a step go through the same few tensor operations. Each row draws from its own generator, so a
seeded request's tokens do not depend on the rows beside it.

Choosing does not wait for a GPU, and needs no token that the host does not know yet: the next step can be launched
behind it. Only a grammar and a prompt's own log-probabilities need the host in between.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.grammar import GrammarState
from engine.logits import RowEdits, SeenTokens, bias_arrays, edit_, token_ids_array
from engine.logprobs import ChosenLogprobs, LogitRows, PromptLogprobs
from engine.scheduler.scheduler import ScheduledSequence
from engine.transfer import send
from engine.types import InvalidRequestError, SamplingParams, TokenLogprob

PREFILTER_WIDTHS = (
    256,
    4096,
    32_768,
)  # candidates per row that top_p is tried with before the whole vocabulary is ranked
BLOCK = 128  # entries that a draw sums up at a time
SEED_MASK = 2**64 - 1  # random.Random takes -1 for 1
MAX_DRAW = 1 - 2.0**-50  # below 1, so that a draw stays within the mass it falls in


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token per row, and its log-probability where the request asked for it."""

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]


@dataclass(frozen=True, slots=True)
class Choice:
    """A step's tokens, maybe still being chosen on the device."""

    token_ids: Tensor  # [N] int64
    asking: tuple[int, ...]  # rows whose log-probabilities were asked for
    chosen_logprobs: ChosenLogprobs | None

    def logprobs(self, token_ids: Sequence[int]) -> list[TokenLogprob | None]:
        """For each row that asks, of the chosen token and of the likeliest; once the device has got so far.

        ``token_ids``: the choice, read by the host.
        """
        result: list[TokenLogprob | None] = [None] * len(token_ids)
        if self.chosen_logprobs is not None:
            found = self.chosen_logprobs.read([token_ids[row] for row in self.asking])
            for row, logprob in zip(self.asking, found, strict=True):
                result[row] = logprob
        return result


class SamplingState:
    """What one request's choices depend on: its parameters, what it has said so far, and its generator.

    ``stop_ids`` are the tokens that would end the request; they cannot be chosen before ``min_tokens`` tokens, unless
    the grammar allows nothing else. ``fallback_seed`` seeds a request without a seed of its own. Raises
    InvalidRequestError for a logit_bias or an allowed token beyond ``vocab_size``, and when no token may be chosen.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        vocab_size: int,
        stop_ids: frozenset[int],
        fallback_seed: int,
        grammar: GrammarState | None = None,
    ) -> None:
        self.params = params
        self.grammar = grammar
        self.prompt_logprobs: PromptLogprobs | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = PromptLogprobs(prompt_ids, params.prompt_logprobs)
        self._num_output_tokens = 0
        self._num_begun = 0  # of output tokens, those being chosen included
        self._random = random.Random((fallback_seed if params.seed is None else params.seed) & SEED_MASK)
        self._bias = bias_arrays(params, vocab_size)
        self._stop_ids: np.ndarray | None = None
        if params.min_tokens and stop_ids and grammar is None:
            self._stop_ids = np.array(sorted(i for i in stop_ids if i < vocab_size), np.int64)
        self._allowed_ids = _allowed_ids(params, vocab_size, stop_ids)
        self._seen: SeenTokens | None = None
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1:
            self._seen = SeenTokens(prompt_ids if params.repetition_penalty != 1 else ())
        self._always_argmax = False
        self._always_argmax = self.takes_argmax and self._stop_ids is None

    def begin(self) -> None:
        """Count a token that is being chosen: choices that begin before `append` tells which it is depend on it."""
        self._num_begun += 1

    def append(self, token_id: int) -> None:
        """Count a chosen token. Costs the same however long the request is."""
        self._num_output_tokens += 1
        self._num_begun = max(self._num_begun, self._num_output_tokens)
        if self._seen is not None:
            self._seen.append(token_id)
        if self.grammar is not None:
            self.grammar.append(token_id)

    def take_prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        """The prompt's log-probabilities, once, when they are complete; None if not asked for or taken before."""
        collector, self.prompt_logprobs = self.prompt_logprobs, None
        return collector.result() if collector is not None else None

    @property
    def adjusts_logits(self) -> bool:
        """Whether the next token is chosen from other logits than the model's own."""
        edited = self._bias is not None or self._seen is not None or self._allowed_ids is not None
        return edited or self._bans_stop_ids or self.grammar is not None

    @property
    def takes_argmax(self) -> bool:
        """Whether the next token is the model's own likeliest and nothing else is asked for."""
        return self._always_argmax or (self.params.greedy and self.params.logprobs is None and not self.adjusts_logits)

    @property
    def always_argmax(self) -> bool:
        """... for all of the request."""
        return self._always_argmax

    @property
    def needs_host(self) -> bool:
        """Whether the next step may only be launched once the host knows this one's token."""
        return self.grammar is not None or self.prompt_logprobs is not None

    @property
    def _bans_stop_ids(self) -> bool:
        return self._stop_ids is not None and self._num_begun < self.params.min_tokens

    def logit_rows(self, item: ScheduledSequence) -> LogitRows:
        """Which logits the request wants of its share of a step."""
        if self.prompt_logprobs is not None:
            return LogitRows(item.num_tokens, item.start, item.samples, self.prompt_logprobs)
        return LogitRows(int(item.samples), item.end - 1, item.samples)

    def edits(self, row: int) -> RowEdits:
        """What is to be done to this request's logits, in row ``row`` of the step."""
        return RowEdits(
            row=row,
            params=self.params,
            bias=self._bias,
            banned_ids=self._stop_ids if self._bans_stop_ids else None,
            seen=self._seen,
            grammar=self.grammar,
            pending=self._num_begun > self._num_output_tokens,
            allowed_ids=self._allowed_ids,
        )

    def draw(self) -> float:
        """The next number in [0, 1) of this request's own sequence."""
        return min(self._random.random(), MAX_DRAW)


def _allowed_ids(params: SamplingParams, vocab_size: int, stop_ids: frozenset[int]) -> np.ndarray | None:
    allowed = params.allowed_token_ids
    if not allowed:
        return None
    if params.min_tokens and stop_ids.issuperset(allowed):
        raise InvalidRequestError(
            "allowed_token_ids are all such as end the answer, which min_tokens forbids", "allowed_token_ids"
        )
    return token_ids_array(allowed, vocab_size, "allowed_token_ids")


def sample(logits: Tensor, states: Sequence[SamplingState]) -> Sampled:
    """`choose`, and wait for it."""
    choice = choose(logits, states)
    token_ids = choice.token_ids.tolist()
    return Sampled(token_ids, choice.logprobs(token_ids))


def choose(logits: Tensor, states: Sequence[SamplingState], newest: Tensor | None = None) -> Choice:
    """Choose the next token of each row. ``logits`` [N, V] float32 are left as they are; ``states`` are N.

    ``newest`` [N]: each row's token before, for states that have not been told it. The caller tells the states what was
    chosen with :meth:`SamplingState.append`, one choice later at the latest.
    """
    raw = logits
    edits = [state.edits(row) for row, state in enumerate(states) if state.adjusts_logits]
    if edits:
        logits = logits.clone()
        edit_(logits, edits, newest)
    chosen = logits.argmax(dim=-1)
    drawn_rows = [row for row, state in enumerate(states) if not state.params.greedy]
    if drawn_rows:
        rows = send(np.array(drawn_rows), logits.device)
        chosen[rows] = _draw(logits[rows], [states[row] for row in drawn_rows])
    asking = tuple(row for row, state in enumerate(states) if state.params.logprobs is not None)
    logprobs = None
    if asking:
        rows = send(np.array(asking), raw.device)
        num_top = [states[row].params.logprobs or 0 for row in asking]
        logprobs = ChosenLogprobs(raw[rows], chosen[rows], num_top)
    for state in states:
        state.begin()
    return Choice(chosen, asking, logprobs)


@dataclass(frozen=True, slots=True)
class _Columns:
    """What the rows of a draw ask for, on the device. Each [N, 1]."""

    draws: Tensor  # float64
    temperature: Tensor  # float32
    min_p: Tensor  # float32
    top_k: Tensor  # int64, the vocabulary's size where there is none
    top_p: Tensor  # float32

    @staticmethod
    def of(states: Sequence[SamplingState], vocab_size: int, device: torch.device) -> _Columns:
        params = [state.params for state in states]
        rows = [
            (state.draw(), p.temperature, p.min_p, vocab_size if p.num_top is None else p.num_top, p.top_p)
            for state, p in zip(states, params, strict=True)
        ]
        columns = send(np.array(rows, np.float64).T, device)[..., None]
        return _Columns(columns[0], columns[1].float(), columns[2].float(), columns[3].long(), columns[4].float())

    def take(self, rows: Tensor) -> _Columns:
        return _Columns(*(getattr(self, column.name)[rows] for column in fields(self)))


def _draw(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Tokens [N] drawn from ``logits`` [N, V], which are overwritten."""
    params = [state.params for state in states]
    columns = _Columns.of(states, logits.shape[-1], logits.device)
    # The largest logit becomes 0 first: a tiny temperature then overflows to -inf, never to inf - inf.
    weights = logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(columns.temperature).exp_()  # the largest is 1
    if any(p.min_p > 0 for p in params):
        weights.mul_(weights >= columns.min_p)
    is_truncated = np.array([p.num_top is not None or p.top_p < 1 for p in params])
    if not is_truncated.any():
        return _pick(weights, columns.draws)
    if is_truncated.all():
        return _draw_truncated(weights, columns)
    tokens = torch.empty(len(params), dtype=torch.long, device=logits.device)
    whole, truncated = (send(np.flatnonzero(rows), logits.device) for rows in (~is_truncated, is_truncated))
    tokens[whole] = _pick(weights[whole], columns.draws[whole])
    tokens[truncated] = _draw_truncated(weights[truncated], columns.take(truncated))
    return tokens


def _draw_truncated(weights: Tensor, columns: _Columns) -> Tensor:
    """Tokens [N] of the ``top_k`` likeliest and of the smallest set holding ``top_p`` of these.

    Only the likeliest candidates are ranked; rows whose set is larger are done again.
    """
    vocab_size = weights.shape[-1]
    totals = weights.sum(dim=-1, keepdim=True)
    widths = [*(width for width in PREFILTER_WIDTHS if width < vocab_size), vocab_size]
    tokens, complete = _draw_among(weights, totals, columns, widths[0])
    if weights.is_cuda:
        from engine.sampling_kernels import draw_incomplete_

        draw_incomplete_(tokens, complete, weights, columns.top_k, columns.top_p, columns.draws)
        return tokens
    for width in widths[1:]:
        pending = (~complete).nonzero()[:, 0]
        if not len(pending):
            break
        tokens[pending], complete[pending] = _draw_among(
            weights[pending], totals[pending], columns.take(pending), width
        )
    return tokens


def _draw_among(weights: Tensor, totals: Tensor, columns: _Columns, width: int) -> tuple[Tensor, Tensor]:
    """Tokens [N] drawn among the ``width`` likeliest, and whether these hold the row's whole set [N]."""
    ranked, token_ids = _rank(weights, width)
    kept, complete = _truncate(ranked, totals, columns.top_k, columns.top_p, weights.shape[-1])
    return token_ids.gather(-1, _pick(kept, columns.draws)[:, None])[:, 0], complete


def _rank(weights: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The ``width`` largest of each row, best first, and their token ids; of equal ones the first ids."""
    if width < weights.shape[-1]:
        ranked = weights.topk(width, dim=-1)
        return ranked.values, ranked.indices
    values, token_ids = weights.sort(dim=-1, descending=True, stable=True)
    return values, token_ids


def _truncate(ranked: Tensor, totals: Tensor, top_k: Tensor, top_p: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """``ranked`` [N, width] with 0 outside each row's set, and whether the candidates hold the whole set [N].

    ``totals`` [N, 1]: each row's mass over the vocabulary. ``top_k``, ``top_p`` [N, 1].
    """
    width = ranked.shape[-1]
    kept = ranked * (torch.arange(width, device=ranked.device) < top_k)
    mass = kept.cumsum(dim=-1)
    limit = torch.where(top_k <= width, mass[:, -1:], totals) * top_p
    cut = (mass - kept >= limit) & (top_p < 1)  # rounding must not drop a token of a row that keeps all
    has_limit = (top_k <= width) | (top_k >= vocab_size)  # else the mass that top_p is a share of is not known
    complete = (has_limit & (cut[:, -1:] | (top_k <= width))) | (ranked[:, -1:] == 0) | (width == vocab_size)
    return kept.masked_fill_(cut, 0), complete[:, 0]


def _pick(weights: Tensor, draws: Tensor) -> Tensor:
    """Places [N] where ``draws`` [N, 1], as shares of each row's mass, fall in ``weights`` [N, width].

    Sums blocks first and looks into one of them then, which is quicker and rounds less than one long sum.
    """
    num_rows, width = weights.shape
    padded = F.pad(weights, (0, -width % BLOCK)) if width % BLOCK else weights
    blocks = padded.view(num_rows, -1, BLOCK)
    block, draws = _invert(blocks.sum(dim=-1), draws)
    place, _ = _invert(blocks[torch.arange(num_rows, device=weights.device), block], draws)
    return block * BLOCK + place


def _invert(mass: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """The entry [N] of ``mass`` [N, B] that each draw [N, 1] falls in, and where in that entry, in [0, 1)."""
    ends = mass.double().cumsum(dim=-1)
    targets = draws * ends[:, -1:]
    entry = torch.searchsorted(ends, targets, right=True).clamp_(max=mass.shape[-1] - 1)
    inside = mass.gather(-1, entry).double()
    within = (targets - (ends.gather(-1, entry) - inside)) / inside
    return entry[:, 0], within.clamp_(0, MAX_DRAW)
