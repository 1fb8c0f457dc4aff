"""What a request will probably use, before it has: from what its tenant's requests used so far. Pure."""

from __future__ import annotations

from dataclasses import dataclass

GAIN = 0.1
MIN_SAMPLES = 5
PRIOR_OUTPUT_TOKENS = 64.0


@dataclass(frozen=True, slots=True)
class OutputLength:
    """The mean number of tokens per answer."""

    mean_tokens: float = PRIOR_OUTPUT_TOKENS
    num_samples: int = 0

    def observe(self, num_tokens: float) -> OutputLength:
        gain = max(GAIN, 1 / (self.num_samples + 1))
        return OutputLength(self.mean_tokens + gain * (num_tokens - self.mean_tokens), self.num_samples + 1)

    def expect(self, max_tokens: int) -> float:
        """Of an answer that may have ``max_tokens``; those, until enough answers have been seen."""
        return float(max_tokens) if self.num_samples < MIN_SAMPLES else min(max_tokens, self.mean_tokens)
