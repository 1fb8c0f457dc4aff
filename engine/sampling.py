"""Choosing tokens: logits [N, V] and one SamplingState per row in, one token per row out.

The order is vLLM's: log-probabilities of the raw logits; then logit_bias, the min_tokens mask, penalties,
temperature, min_p, top_k, top_p, and the draw. Each row draws from its own generator, so a seeded request's tokens do
not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.types import InvalidRequestError, SamplingParams, TokenLogprob

SEED_MASK = 2**63 - 1  # seeds a torch.Generator takes


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token per row, and its log-probability where the request asked for it."""

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]


class SamplingState:
    """What one request's choices depend on: its parameters, what it has said so far, and its generator.

    ``stop_ids`` are the tokens that would end the request; they cannot be chosen before ``min_tokens`` tokens.
    ``fallback_seed`` seeds a request without a seed of its own. Raises InvalidRequestError for a logit_bias beyond
    ``vocab_size``.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        vocab_size: int,
        stop_ids: frozenset[int],
        device: torch.device | str,
        fallback_seed: int,
    ) -> None:
        self.params = params
        self._num_output_tokens = 0
        self._generator: torch.Generator | None = None
        if not params.greedy:
            seed = fallback_seed if params.seed is None else params.seed
            self._generator = torch.Generator(device).manual_seed(seed & SEED_MASK)

        self._bias_ids, self._biases = _bias_tensors(params, vocab_size, device)
        self._stop_ids: Tensor | None = None
        if params.min_tokens and stop_ids:
            reachable = sorted(token_id for token_id in stop_ids if token_id < vocab_size)
            self._stop_ids = torch.tensor(reachable, dtype=torch.long, device=device)

        self._counts: Tensor | None = None  # [V] times said in the output
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1:
            self._counts = torch.zeros(vocab_size, device=device)
        self._in_prompt: Tensor | None = None  # [V] bool
        if params.repetition_penalty != 1:
            self._in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._in_prompt[torch.tensor(list(prompt_ids), dtype=torch.long, device=device)] = True

    def append(self, token_id: int) -> None:
        """Count a chosen token. Costs the same however long the request is."""
        self._num_output_tokens += 1
        if self._counts is not None:
            self._counts[token_id] += 1

    @property
    def adjusts_logits(self) -> bool:
        """Whether the next token is chosen from other logits than the model's own."""
        return self._bias_ids is not None or self._masks_stop_ids or self._counts is not None

    @property
    def takes_argmax(self) -> bool:
        """Whether the next token is the model's own likeliest and nothing else is asked for."""
        return self.params.greedy and self.params.logprobs is None and not self.adjusts_logits

    @property
    def _masks_stop_ids(self) -> bool:
        return self._stop_ids is not None and self._num_output_tokens < self.params.min_tokens

    def adjust_(self, row: Tensor) -> None:
        """Apply logit_bias, the min_tokens mask and penalties to ``row`` [V] in place."""
        if self._bias_ids is not None and self._biases is not None:
            row.index_add_(0, self._bias_ids, self._biases)
        if self._stop_ids is not None and self._masks_stop_ids:
            row[self._stop_ids] = -torch.inf
        if self._counts is None:
            return
        if self._in_prompt is not None:
            penalty = self.params.repetition_penalty
            penalised = torch.where(row > 0, row / penalty, row * penalty)
            row.copy_(torch.where(self._in_prompt | (self._counts > 0), penalised, row))
        row.sub_(self._counts, alpha=self.params.frequency_penalty)
        row.sub_((self._counts > 0).to(row.dtype), alpha=self.params.presence_penalty)

    def fill_gumbel_(self, row: Tensor) -> None:
        """Fill ``row`` [V] with standard Gumbel noise; adding it to logits makes argmax a draw from their softmax."""
        row.exponential_(generator=self._generator).log_().neg_()


def sample(logits: Tensor, states: Sequence[SamplingState]) -> Sampled:
    """Choose the next token of each row. ``logits`` [N, V] float32 are left as they are; ``states`` are N.

    The caller tells the states what was chosen with :meth:`SamplingState.append`.
    """
    raw = logits
    if any(state.adjusts_logits for state in states):
        logits = logits.clone()
        for row, state in zip(logits, states, strict=True):
            if state.adjusts_logits:
                state.adjust_(row)
    chosen = logits.argmax(dim=-1)
    drawn_rows = [row for row, state in enumerate(states) if not state.params.greedy]
    if drawn_rows:
        rows = torch.tensor(drawn_rows, device=logits.device)
        chosen[rows] = _draw(logits[rows], [states[row] for row in drawn_rows])
    return Sampled(token_ids=chosen.tolist(), logprobs=_logprobs(raw, chosen, states))


def _draw(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Tokens [N] drawn from ``logits`` [N, V], which are overwritten."""
    params = [state.params for state in states]
    # The largest logit becomes 0 first: a tiny temperature then overflows to -inf, never to inf - inf.
    logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(_column([p.temperature for p in params], logits))
    if any(p.min_p > 0 for p in params):
        logits.masked_fill_(logits < _column([p.min_p for p in params], logits).log(), -torch.inf)
    truncated = [row for row, p in enumerate(params) if p.top_k != -1 or p.top_p < 1]
    if truncated:
        rows = torch.tensor(truncated, device=logits.device)
        logits[rows] = _truncate(logits[rows], [params[row] for row in truncated])
    noise = torch.empty_like(logits)
    for row, state in zip(noise, states, strict=True):
        state.fill_gumbel_(row)
    return logits.add_(noise).argmax(dim=-1)


def _truncate(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """``logits`` [N, V] with -inf outside the top_k most likely tokens and the smallest set holding top_p of these."""
    vocab_size = logits.shape[-1]
    ranked, token_ids = logits.sort(dim=-1, descending=True, stable=True)
    top_k = _column([vocab_size if p.top_k == -1 else p.top_k for p in params], logits)
    ranked.masked_fill_(torch.arange(vocab_size, device=logits.device) >= top_k, -torch.inf)
    probs = ranked.softmax(dim=-1)
    mass_before = probs.cumsum(dim=-1) - probs
    top_p = _column([p.top_p for p in params], logits)
    cut = (mass_before >= top_p) & (top_p < 1)  # rounding must not drop a token of a row that keeps all
    return torch.empty_like(logits).scatter_(-1, token_ids, ranked.masked_fill_(cut, -torch.inf))


def _logprobs(raw: Tensor, chosen: Tensor, states: Sequence[SamplingState]) -> list[TokenLogprob | None]:
    """For each row that asks, log-probabilities in ``raw`` [N, V] of the ``chosen`` [N] token and of the likeliest."""
    result: list[TokenLogprob | None] = [None] * len(states)
    asking = {row: k for row, state in enumerate(states) if (k := state.params.logprobs) is not None}
    if not asking:
        return result
    rows = torch.tensor(list(asking), device=raw.device)
    logprobs = raw[rows].log_softmax(dim=-1)
    chosen_logprobs = logprobs.gather(-1, chosen[rows, None])[:, 0].tolist()
    token_ids = chosen[rows].tolist()
    top_logprobs, top_ids = (top.tolist() for top in logprobs.topk(min(max(asking.values()), raw.shape[-1]), dim=-1))
    for i, (row, num_top) in enumerate(asking.items()):
        top = tuple(zip(top_ids[i][:num_top], top_logprobs[i][:num_top], strict=True))
        result[row] = TokenLogprob(token_ids[i], chosen_logprobs[i], top)
    return result


def _bias_tensors(
    params: SamplingParams, vocab_size: int, device: torch.device | str
) -> tuple[Tensor | None, Tensor | None]:
    """logit_bias as token ids and values, both [number of biases]; None and None without any."""
    if not params.logit_bias:
        return None, None
    for token_id, _ in params.logit_bias:
        if token_id >= vocab_size:
            raise InvalidRequestError(
                f"logit_bias has token id {token_id}, the vocabulary ends at {vocab_size - 1}", "logit_bias"
            )
    token_ids, biases = zip(*params.logit_bias, strict=True)
    return torch.tensor(token_ids, device=device), torch.tensor(biases, dtype=torch.float32, device=device)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """``values`` as [N, 1] on the device and of the type of ``like``."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
