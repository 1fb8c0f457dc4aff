"""What is asked of a model, and of whatever answers for it at one brownout level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Request:
    """Score the tokens from ``start`` on, given those before."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class TokenScore:
    logprob: float
    is_greedy: bool  # it was the most likely token
    greedy_id: int | str  # the most likely token, by whatever name the source gives it


class Scorer(Protocol):
    """What answers at one level."""

    def token_scores(self, requests: Sequence[Request]) -> list[list[TokenScore]]:
        """Of each request, the tokens from its start on."""

    def score(self, requests: Sequence[Request]) -> list[float]:
        """Summed log-likelihoods in nats."""

    def continue_greedily(self, prompts: Sequence[tuple[int, ...]], num_tokens: int) -> list[list[int] | list[str]]:
        """At most ``num_tokens`` tokens after each prompt; fewer if the model ends its answer."""
