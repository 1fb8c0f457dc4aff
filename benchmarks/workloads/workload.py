"""What is sent and when. A workload is data: the same object can be replayed against any server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.workloads.lengths import LengthRange, draw_lengths, draw_prompt


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request, due ``at_s`` after the run's start; it gets exactly ``max_tokens``, end-of-sequence or not."""

    at_s: float
    prompt_ids: tuple[int, ...]
    max_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Arrivals in order of time; ``duration_s`` is how long requests are offered, not how long they take."""

    arrivals: tuple[Arrival, ...]
    duration_s: float

    def marked(self, token_id: int) -> Workload:
        """The same workload with ``token_id`` as the first token of every prompt.

        Runs marked differently share no prefix, so a later run finds nothing of an earlier one in the prefix cache.
        """
        arrivals = tuple(replace(a, prompt_ids=(token_id, *a.prompt_ids[1:])) for a in self.arrivals)
        return replace(self, arrivals=arrivals)


def synthesize(
    times_s: Sequence[float],
    duration_s: float,
    prompt_tokens: LengthRange,
    output_tokens: LengthRange,
    vocab_size: int,
    seed: int,
) -> Workload:
    """Random prompts of random lengths at the given times; equal arguments give equal workloads."""
    rng = np.random.default_rng([seed, len(times_s)])
    prompt_lengths = draw_lengths(prompt_tokens, len(times_s), rng)
    output_lengths = draw_lengths(output_tokens, len(times_s), rng)
    arrivals = tuple(
        Arrival(at_s, draw_prompt(prompt_length, vocab_size, rng), output_length, seed=seed + index)
        for index, (at_s, prompt_length, output_length) in enumerate(
            zip(times_s, prompt_lengths, output_lengths, strict=True)
        )
    )
    return Workload(arrivals, duration_s)


def endless(prompt_tokens: LengthRange, output_tokens: LengthRange, vocab_size: int, seed: int) -> Iterator[Arrival]:
    """Requests without a time of their own, for a closed loop."""
    rng = np.random.default_rng(seed)
    index = 0
    while True:
        prompt_length, output_length = (draw_lengths(r, 1, rng)[0] for r in (prompt_tokens, output_tokens))
        yield Arrival(0.0, draw_prompt(prompt_length, vocab_size, rng), output_length, seed=seed + index)
        index += 1
