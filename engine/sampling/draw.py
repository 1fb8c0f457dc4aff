"""Draws of many rows at once: temperature, min_p, top_k, top_p, then one token of each row by its own number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.sampling.state import MAX_DRAW, SamplingState
from engine.transfer import send

# Candidates per row that top_p is tried with before the whole vocabulary is ranked.
PREFILTER_WIDTHS = (256, 4096, 32_768)
BLOCK = 128  # entries that a draw sums up at a time


@dataclass(frozen=True, slots=True)
class Columns:
    """What the rows of a draw ask for, on the device. Each [N, 1]."""

    draws: Tensor  # float64
    temperature: Tensor  # float32
    min_p: Tensor  # float32
    top_k: Tensor  # int64, the vocabulary's size where there is none
    top_p: Tensor  # float32

    @staticmethod
    def of(states: Sequence[SamplingState], vocab_size: int, device: torch.device) -> Columns:
        params = [state.params for state in states]
        rows = [
            (state.draw(), p.temperature, p.min_p, vocab_size if p.num_top is None else p.num_top, p.top_p)
            for state, p in zip(states, params, strict=True)
        ]
        columns = send(np.array(rows, np.float64).T, device)[..., None]
        return Columns(columns[0], columns[1].float(), columns[2].float(), columns[3].long(), columns[4].float())

    def take(self, rows: Tensor) -> Columns:
        return Columns(*(getattr(self, column.name)[rows] for column in fields(self)))


def draw(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Tokens [N] drawn from ``logits`` [N, V], which are overwritten."""
    params = [state.params for state in states]
    columns = Columns.of(states, logits.shape[-1], logits.device)
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


def _draw_truncated(weights: Tensor, columns: Columns) -> Tensor:
    """Tokens [N] of the ``top_k`` likeliest and of the smallest set holding ``top_p`` of these.

    Only the likeliest candidates are ranked; rows whose set is larger are done again.
    """
    vocab_size = weights.shape[-1]
    totals = weights.sum(dim=-1, keepdim=True)
    widths = [*(width for width in PREFILTER_WIDTHS if width < vocab_size), vocab_size]
    tokens, complete = draw_among(weights, totals, columns, widths[0])
    if weights.is_cuda:
        from engine.sampling.kernels import draw_incomplete_

        draw_incomplete_(tokens, complete, weights, columns.top_k, columns.top_p, columns.draws)
        return tokens
    for width in widths[1:]:
        pending = (~complete).nonzero()[:, 0]
        if not len(pending):
            break
        tokens[pending], complete[pending] = draw_among(weights[pending], totals[pending], columns.take(pending), width)
    return tokens


def draw_among(weights: Tensor, totals: Tensor, columns: Columns, width: int) -> tuple[Tensor, Tensor]:
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
