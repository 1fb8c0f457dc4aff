"""Log-probabilities for the answer: of chosen tokens and of a prompt's own, always from the model's raw logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from engine.transfer import fetch
from engine.types import TokenLogprob

ROWS_AT_A_TIME = 256  # of a prompt: each takes the vocabulary in float32 a few times over


class ChosenLogprobs:
    """Of each row of ``logits`` [N, V], the log-probability of ``token_ids`` [N] and of the ``num_top`` likeliest.

    Computed on the device and sent to the host without waiting for it.
    """

    def __init__(self, logits: Tensor, token_ids: Tensor, num_top: Sequence[int]) -> None:
        logprobs = logits.float().log_softmax(dim=-1)
        top = logprobs.topk(min(max(num_top), logits.shape[-1]), dim=-1)
        self._num_top = num_top
        self._chosen = fetch(logprobs.gather(-1, token_ids[:, None])[:, 0])
        self._ids, self._values = fetch(top.indices), fetch(top.values)

    def read(self, token_ids: Sequence[int]) -> list[TokenLogprob]:
        """Once the device has got so far; ``token_ids`` as known to the host."""
        columns = (self._chosen.tolist(), self._ids.tolist(), self._values.tolist())
        return [
            TokenLogprob(token_id, logprob, tuple(zip(ids[:k], values[:k], strict=True)))
            for token_id, logprob, ids, values, k in zip(token_ids, *columns, self._num_top, strict=True)
        ]


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: Sequence[int]) -> list[TokenLogprob]:
    """`ChosenLogprobs`, and wait for them."""
    pending = ChosenLogprobs(logits, token_ids, num_top)
    return pending.read(token_ids.tolist())  # which waits for the device


class PromptLogprobs:
    """Collects a prompt's log-probabilities chunk by chunk; a chunk computed again replaces itself.

    The first token has none: nothing precedes it.
    """

    def __init__(self, prompt_ids: Sequence[int], num_top: int) -> None:
        self._prompt_ids = prompt_ids
        self._num_top = num_top
        self._found: dict[int, TokenLogprob] = {}  # position |-> logprob of the prompt's token there

    def take(self, logits: Tensor, start: int) -> None:
        """``logits`` [rows, V] of the tokens at the positions from ``start`` on, those past the prompt included."""
        wanted = self._prompt_ids[start + 1 : start + 1 + len(logits)]
        for first in range(0, len(wanted), ROWS_AT_A_TIME):
            token_ids = torch.tensor(wanted[first : first + ROWS_AT_A_TIME], device=logits.device)
            rows = logits[first : first + len(token_ids)]
            found = token_logprobs(rows, token_ids, [self._num_top] * len(rows))
            ranks = 1 + (rows > rows.gather(-1, token_ids[:, None])).sum(dim=-1)
            ranked = (replace(each, rank=rank) for each, rank in zip(found, ranks.tolist(), strict=True))
            self._found.update(enumerate(ranked, start + first + 1))

    def result(self) -> tuple[TokenLogprob | None, ...]:
        """One for each token of the prompt, the first None."""
        return (None, *(self._found[position] for position in range(1, len(self._prompt_ids))))


@dataclass(frozen=True, slots=True)
class LogitRows:
    """One sequence's consecutive rows among a step's logits: all of its chunk, only the last, or none."""

    num_rows: int
    start: int  # position of the first row's token
    samples: bool  # from the last row
    collector: PromptLogprobs | None = None


def take_prompt_rows(logits: Tensor, sequences: Sequence[LogitRows]) -> Tensor:
    """Give the collectors their rows of ``logits`` [rows, V]; returns the rows to sample from [N, V]."""
    if all(rows.collector is None for rows in sequences):
        return logits
    ends = list(accumulate(rows.num_rows for rows in sequences))
    for rows, end in zip(sequences, ends, strict=True):
        if rows.collector is not None:
            rows.collector.take(logits[end - rows.num_rows : end], rows.start)
    return logits[[end - 1 for rows, end in zip(sequences, ends, strict=True) if rows.samples]]
