"""Tokens to text while they arrive, and the search for stop strings in it.

Text leaves as soon as nothing can change it: an incomplete character waits for its other bytes, and a tail that may
begin a stop string waits until it does or does not. The cost of a token does not depend on those before it.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from engine.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """One request's text. A stop string counts only if token number ``min_tokens`` or a later one completes it.

    The stop string that is completed first wins, and of several completed by the same character the longest, so the
    result does not depend on how the text falls into tokens. ``include_stop`` keeps the stop string in the text.
    ``skip_special``: control tokens are no text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...],
        include_stop: bool,
        min_tokens: int,
        skip_special: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._stop = stop
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_tokens = 0
        self._held = ""  # decoded, but may begin a stop string
        self._matched: str | None = None

    def append(self, token_ids: Sequence[int]) -> tuple[str, str | None]:
        """New text that is safe to show, and the stop string that ended the text, if one did.

        Nothing after a stop string is ever shown.
        """
        shown = ""
        for token_id in token_ids:
            if self._matched is not None:
                break
            self._num_tokens += 1
            if not (self._skip_special and self._tokenizer.is_special(token_id)):
                text = self._utf8.decode(self._tokenizer.token_bytes(token_id))
                shown += self._add(text) if self._stop else text
        return shown, self._matched

    def flush(self) -> str:
        """The rest of the text, when no token will follow; a dangling incomplete character becomes U+FFFD."""
        if self._matched is not None:
            return ""
        rest = self._held + self._utf8.decode(b"", final=True)
        self._held = ""
        return rest

    def _add(self, text: str) -> str:
        """Take in ``text`` and return what can be shown."""
        num_old = len(self._held)
        self._held += text
        if self._num_tokens >= self._min_tokens and (match := self._first_match(num_old)):
            start, self._matched = match
            shown = self._held[: start + len(self._matched) if self._include_stop else start]
            self._held = ""
            return shown
        num_safe = len(self._held) - self._num_held_back()
        shown, self._held = self._held[:num_safe], self._held[num_safe:]
        return shown

    def _first_match(self, num_old: int) -> tuple[int, str] | None:
        """(start, stop string) of the match that ends first, then starts first, past the ``num_old`` searched chars."""
        found = [
            (start + len(stop), start, stop)
            for stop in self._stop
            if (start := self._held.find(stop, max(0, num_old - len(stop) + 1))) >= 0
        ]
        return min(found)[1:] if found else None

    def _num_held_back(self) -> int:
        """Length of the longest tail of the held text that a stop string could still begin with."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for start in range(max(0, len(self._held) - longest), len(self._held)):
            tail = self._held[start:]
            if any(stop.startswith(tail) for stop in self._stop):
                return len(tail)
        return 0
