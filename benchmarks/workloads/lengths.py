"""How long prompts and answers are, and what random prompts are made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class LengthRange:
    """Uniform over ``low .. high`` tokens, both included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ValueError(f"low {self.low} and high {self.high} must satisfy 1 <= low <= high")

    @property
    def mean(self) -> float:
        return (self.low + self.high) / 2


def draw_lengths(lengths: LengthRange, count: int, rng: np.random.Generator) -> list[int]:
    return rng.integers(lengths.low, lengths.high, size=count, endpoint=True).tolist()


def draw_prompt(num_tokens: int, vocab_size: int, rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(rng.integers(0, vocab_size, size=num_tokens).tolist())
