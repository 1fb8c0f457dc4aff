"""Is generated text still text? Length, repetition, and how long it follows level 0's. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NGRAM = 4


@dataclass(frozen=True, slots=True)
class Continuations:
    """Greedy continuations as token ids, or as token texts."""

    tokens: Sequence[Sequence[int | str]]
    max_tokens: int


def describe(text: Continuations) -> dict[str, float]:
    """Mean length; share that ended by themselves; share of 4-grams that were there before in the same text."""
    return {
        "mean_tokens": round(_mean([len(tokens) for tokens in text.tokens]), 2),
        "ended_frac": round(_mean([len(tokens) < text.max_tokens for tokens in text.tokens]), 4),
        "repetition": round(_mean([repetition(tokens) for tokens in text.tokens]), 4),
    }


def compare_continuations(text: Continuations, exact: Continuations) -> dict[str, float]:
    """Tokens in common before the first that differs, and share of texts that never do."""
    common = [_common_prefix(a, b) for a, b in zip(text.tokens, exact.tokens, strict=True)]
    same = [list(a) == list(b) for a, b in zip(text.tokens, exact.tokens, strict=True)]
    return {"common_tokens": round(_mean(common), 2), "same_frac": round(_mean(same), 4)}


def repetition(tokens: Sequence[int | str]) -> float:
    ngrams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _common_prefix(a: Sequence[int | str], b: Sequence[int | str]) -> int:
    for index, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return index
    return min(len(a), len(b))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
