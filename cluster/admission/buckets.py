"""Token buckets of a tenant: requests and tokens per minute. Pure; the script in shared.py does the same in Redis.

A bucket holds a minute's worth at most and fills evenly. A request takes from both buckets or from none. What it takes
of tokens is an estimate, settled when it has ended: a level may so become negative, which later requests wait off.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class RateKind(StrEnum):
    REQUESTS = "requests"
    TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class Rates:
    """Per minute; None: no limit."""

    requests: float | None = None
    tokens: float | None = None

    @property
    def limited(self) -> bool:
        return self.requests is not None or self.tokens is not None

    def shared_by(self, num: int) -> Rates:
        """Each one's part."""
        return Rates(
            None if self.requests is None else self.requests / num, None if self.tokens is None else self.tokens / num
        )


@dataclass(frozen=True, slots=True)
class Levels:
    """What is left in the buckets; meaningless where there is no limit."""

    requests: float
    tokens: float


@dataclass(frozen=True, slots=True)
class Grant:
    """``short`` names the bucket that did not hold enough; then nothing was taken. Levels are those after it."""

    levels: Levels
    short: RateKind | None = None


def full(rates: Rates) -> Levels:
    return Levels(rates.requests or 0.0, rates.tokens or 0.0)


def refill(levels: Levels, rates: Rates, elapsed_s: float) -> Levels:
    """The levels ``elapsed_s`` later; a clock that went backwards adds nothing."""
    return Levels(
        _refill(levels.requests, rates.requests, elapsed_s),
        _refill(levels.tokens, rates.tokens, elapsed_s),
    )


def take(levels: Levels, rates: Rates, num_requests: float, num_tokens: float, force: bool = False) -> Grant:
    """Take from both or from none; ``force``: what has been used already, or is given back (negative)."""
    if not force:
        if rates.requests is not None and levels.requests < num_requests:
            return Grant(levels, RateKind.REQUESTS)
        if rates.tokens is not None and levels.tokens < num_tokens:
            return Grant(levels, RateKind.TOKENS)
    requests = levels.requests if rates.requests is None else levels.requests - num_requests
    tokens = levels.tokens if rates.tokens is None else min(rates.tokens, levels.tokens - num_tokens)
    return Grant(Levels(requests, tokens))


def wait_s(levels: Levels, rates: Rates, num_requests: float, num_tokens: float) -> float:
    """How long until both buckets hold so much, if nobody else takes from them."""
    return max(_wait_s(levels.requests, rates.requests, num_requests), _wait_s(levels.tokens, rates.tokens, num_tokens))


def _refill(level: float, per_minute: float | None, elapsed_s: float) -> float:
    if per_minute is None:
        return level
    return min(per_minute, level + max(elapsed_s, 0.0) * per_minute / 60)


def _wait_s(level: float, per_minute: float | None, wanted: float) -> float:
    if per_minute is None or level >= wanted:
        return 0.0
    return (wanted - level) / per_minute * 60
