"""Choosing tokens: logits [N, V] and one SamplingState per row in, one token per row out.

The order is vLLM's: log-probabilities of the raw logits; then logit_bias, the min_tokens mask, penalties, the
grammar's mask, temperature, min_p, top_k, top_p, and the draw. Nothing here costs a pass over the vocabulary per
request: all rows of a step go through the same few tensor operations. Each row draws from its own generator, so a
seeded request's tokens do not depend on the rows beside it.

Choosing does not wait for a GPU, and needs no token that the host does not know yet: the next step can be launched
behind it. Only a grammar and a prompt's own log-probabilities need the host in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from engine.sampling.draw import draw
from engine.sampling.logits import edit_
from engine.sampling.logprobs import ChosenLogprobs
from engine.sampling.state import SamplingState
from engine.transfer import send
from engine.types import TokenLogprob


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
        chosen[rows] = draw(logits[rows], [states[row] for row in drawn_rows])
    asking = tuple(row for row, state in enumerate(states) if state.params.logprobs is not None)
    logprobs = None
    if asking:
        rows = send(np.array(asking), raw.device)
        num_top = [states[row].params.logprobs or 0 for row in asking]
        logprobs = ChosenLogprobs(raw[rows], chosen[rows], num_top)
    for state in states:
        state.begin()
    return Choice(chosen, asking, logprobs)
