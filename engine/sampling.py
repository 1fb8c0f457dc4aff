"""Choosing tokens: logits [N, V] and one SamplingState per row in, one token per row out.

The order is vLLM's: log-probabilities of the raw logits; then logit_bias, the min_tokens mask, penalties, the
grammar's mask, temperature, min_p, top_k, top_p, and the draw. Nothing here costs a pass over the vocabulary per
request: all rows of a step go through the same few tensor operations. Each row draws from its own generator, so a
seeded request's tokens do not depend on the rows beside it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.grammar import GrammarState
from engine.logits import RowEdits, SeenTokens, bias_arrays, edit_
from engine.logprobs import LogitRows, PromptLogprobs, token_logprobs
from engine.scheduler.scheduler import ScheduledSequence
from engine.types import SamplingParams, TokenLogprob

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


class SamplingState:
    """What one request's choices depend on: its parameters, what it has said so far, and its generator.

    ``stop_ids`` are the tokens that would end the request; they cannot be chosen before ``min_tokens`` tokens, unless
    the grammar allows nothing else. ``fallback_seed`` seeds a request without a seed of its own. Raises
    InvalidRequestError for a logit_bias beyond ``vocab_size``.
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
        self._random = random.Random((fallback_seed if params.seed is None else params.seed) & SEED_MASK)
        self._bias = bias_arrays(params, vocab_size)
        self._stop_ids: np.ndarray | None = None
        if params.min_tokens and stop_ids and grammar is None:
            self._stop_ids = np.array(sorted(i for i in stop_ids if i < vocab_size), np.int64)
        self._seen: SeenTokens | None = None
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1:
            self._seen = SeenTokens(prompt_ids if params.repetition_penalty != 1 else ())
        self._always_argmax = False
        self._always_argmax = self.takes_argmax and self._stop_ids is None

    def append(self, token_id: int) -> None:
        """Count a chosen token. Costs the same however long the request is."""
        self._num_output_tokens += 1
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
        return self._bias is not None or self._bans_stop_ids or self._seen is not None or self.grammar is not None

    @property
    def takes_argmax(self) -> bool:
        """Whether the next token is the model's own likeliest and nothing else is asked for."""
        return self._always_argmax or (self.params.greedy and self.params.logprobs is None and not self.adjusts_logits)

    @property
    def _bans_stop_ids(self) -> bool:
        return self._stop_ids is not None and self._num_output_tokens < self.params.min_tokens

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
        )

    def draw(self) -> float:
        """The next number in [0, 1) of this request's own sequence."""
        return min(self._random.random(), MAX_DRAW)


def sample(logits: Tensor, states: Sequence[SamplingState]) -> Sampled:
    """Choose the next token of each row. ``logits`` [N, V] float32 are left as they are; ``states`` are N.

    The caller tells the states what was chosen with :meth:`SamplingState.append`.
    """
    raw = logits
    edits = [state.edits(row) for row, state in enumerate(states) if state.adjusts_logits]
    if edits:
        logits = logits.clone()
        edit_(logits, edits)
    chosen = logits.argmax(dim=-1)
    drawn_rows = [row for row, state in enumerate(states) if not state.params.greedy]
    if drawn_rows:
        rows = torch.tensor(drawn_rows, device=logits.device)
        chosen[rows] = _draw(logits[rows], [states[row] for row in drawn_rows])
    return Sampled(token_ids=chosen.tolist(), logprobs=_logprobs(raw, chosen, states))


def _draw(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Tokens [N] drawn from ``logits`` [N, V], which are overwritten."""
    params = [state.params for state in states]
    draws = _column([state.draw() for state in states], logits.device, torch.float64)
    # The largest logit becomes 0 first: a tiny temperature then overflows to -inf, never to inf - inf.
    temperatures = _column([p.temperature for p in params], logits.device)
    weights = logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(temperatures).exp_()  # the largest is 1
    if any(p.min_p > 0 for p in params):
        weights.mul_(weights >= _column([p.min_p for p in params], logits.device))
    truncated = [row for row, p in enumerate(params) if p.num_top is not None or p.top_p < 1]
    if not truncated:
        return _pick(weights, draws)
    tokens = torch.empty(len(params), dtype=torch.long, device=logits.device)
    whole = [row for row in range(len(params)) if row not in set(truncated)]
    if whole:
        tokens[whole] = _pick(weights[whole], draws[whole])
    tokens[truncated] = _draw_truncated(weights[truncated], [params[row] for row in truncated], draws[truncated])
    return tokens


def _draw_truncated(weights: Tensor, params: Sequence[SamplingParams], draws: Tensor) -> Tensor:
    """Tokens [N] of the ``top_k`` likeliest and of the smallest set holding ``top_p`` of these.

    Only the likeliest candidates are ranked; rows whose set is larger are done again with more.
    """
    vocab_size = weights.shape[-1]
    totals = weights.sum(dim=-1, keepdim=True)
    tokens = torch.empty(len(params), dtype=torch.long, device=weights.device)
    pending = list(range(len(params)))
    for width in (*(width for width in PREFILTER_WIDTHS if width < vocab_size), vocab_size):
        ranked, token_ids = _rank(weights[pending], width)
        kept, complete = _truncate(ranked, totals[pending], [params[row] for row in pending], vocab_size)
        places = _pick(kept, draws[pending])
        tokens[pending] = token_ids.gather(-1, places[:, None])[:, 0]  # of incomplete rows, for now
        pending = [row for row, done in zip(pending, complete.tolist(), strict=True) if not done]
        if not pending:
            break
    return tokens


def _rank(weights: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The ``width`` largest of each row, best first, and their token ids; of equal ones the first ids."""
    if width < weights.shape[-1]:
        ranked = weights.topk(width, dim=-1)
        return ranked.values, ranked.indices
    values, token_ids = weights.sort(dim=-1, descending=True, stable=True)
    return values, token_ids


def _truncate(
    ranked: Tensor, totals: Tensor, params: Sequence[SamplingParams], vocab_size: int
) -> tuple[Tensor, Tensor]:
    """``ranked`` [N, width] with 0 outside each row's set, and whether the candidates hold the whole set [N].

    ``totals`` [N, 1]: each row's mass over the vocabulary.
    """
    width, device = ranked.shape[-1], ranked.device
    top_k = torch.tensor([vocab_size if p.num_top is None else p.num_top for p in params], device=device)[:, None]
    top_p = _column([p.top_p for p in params], device)
    kept = ranked * (torch.arange(width, device=device) < top_k)
    mass = kept.cumsum(dim=-1)
    limit = torch.where(top_k <= width, mass[:, -1:], totals) * top_p
    cut = (mass - kept >= limit) & (top_p < 1)  # rounding must not drop a token of a row that keeps all
    complete = cut[:, -1:] | (top_k <= width) | (ranked[:, -1:] == 0) | (width == vocab_size)
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


def _logprobs(raw: Tensor, chosen: Tensor, states: Sequence[SamplingState]) -> list[TokenLogprob | None]:
    """For each row that asks, log-probabilities in ``raw`` [N, V] of the ``chosen`` [N] token and of the likeliest."""
    result: list[TokenLogprob | None] = [None] * len(states)
    asking = {row: k for row, state in enumerate(states) if (k := state.params.logprobs) is not None}
    if asking:
        rows = torch.tensor(list(asking), device=raw.device)
        for row, logprob in zip(asking, token_logprobs(raw[rows], chosen[rows], list(asking.values())), strict=True):
            result[row] = logprob
    return result


def _column(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """``values`` as [N, 1] on the device."""
    return torch.tensor(values, dtype=dtype, device=device)[:, None]
