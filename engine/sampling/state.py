"""One request's side of sampling: its parameters, what it has said, its generator."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from engine.sampling.grammar import GrammarState
from engine.sampling.logits import RowEdits, SeenTokens, bias_arrays, token_ids_array
from engine.sampling.logprobs import LogitRows, PromptLogprobs
from engine.scheduler.scheduler import ScheduledSequence
from engine.types import InvalidRequestError, SamplingParams, TokenLogprob

SEED_MASK = 2**64 - 1  # random.Random takes -1 for 1
MAX_DRAW = 1 - 2.0**-50  # below 1, so that a draw stays within the mass it falls in


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
