"""How fast prompts get through, by the scheduler's own clock: what predicts a waiting request's first token. Pure."""

from __future__ import annotations

GAIN = 0.1  # of the newest step
MIN_BUSY_FRAC = 0.5  # of the token budget: steps below it say nothing about how fast prompts could go


class PromptPace:
    """Seconds per prompt token: computed in a well filled step, and admitted while others wait."""

    def __init__(self) -> None:
        self._computed_s: float | None = None
        self._admitted_s: float | None = None
        self._last_s: float | None = None
        self._last_tokens = 0
        self._had_queue = False
        self._tokens_admitted = 0
        self._waited_s = 0.0

    def note_step(
        self, now_s: float, num_running: int, num_tokens: int, budget: int, num_admitted_tokens: int, has_queue: bool
    ) -> None:
        """A step of ``num_tokens`` starts at ``now_s``; what it admitted, and whether others still wait.

        ``num_running`` were in the batch before it: with none, and nobody waiting, the time since the last step may
        have been idle and says nothing.
        """
        is_busy = self._had_queue or num_running > 0
        elapsed_s = 0.0 if self._last_s is None or not is_busy else now_s - self._last_s
        if self._last_tokens >= MIN_BUSY_FRAC * budget and elapsed_s > 0:
            self._computed_s = _mixed(self._computed_s, elapsed_s / self._last_tokens)
        if has_queue:
            self._waited_s += elapsed_s
            self._tokens_admitted += num_admitted_tokens
            if self._tokens_admitted >= budget:
                self._admitted_s = _mixed(self._admitted_s, self._waited_s / self._tokens_admitted)
                self._waited_s, self._tokens_admitted = 0.0, 0
        else:
            self._waited_s, self._tokens_admitted = 0.0, 0
        self._last_s, self._last_tokens, self._had_queue = now_s, num_tokens, has_queue

    def compute_s(self, num_tokens: int) -> float:
        """Of a prompt whose turn it is; 0 while nothing is known."""
        return num_tokens * (self._computed_s or 0.0)

    def ttft_s(self, num_tokens_ahead: int, num_tokens: int) -> float | None:
        """Of a request that joins a queue of ``num_tokens_ahead``; None while nothing is known."""
        if self._computed_s is None and self._admitted_s is None:
            return None
        per_token_s = max(self._computed_s or 0.0, self._admitted_s or 0.0)
        return num_tokens_ahead * per_token_s + self.compute_s(num_tokens)


def _mixed(old: float | None, new: float) -> float:
    return new if old is None else old + GAIN * (new - old)
