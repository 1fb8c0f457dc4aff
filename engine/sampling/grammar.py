"""Grammars that an answer must follow: compiled once each, one matcher per request, masks over the vocabulary.

The library is llguidance: its grammars are strings, it needs no torch, and it computes masks lazily in microseconds.
Compiling may take long for a large grammar; it happens outside the engine's thread (`AsyncEngine.generate`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from engine.text.tokenizer import Tokenizer
from engine.types import InvalidRequestError

NUM_CACHED = 64  # compiled grammars kept; the same schema comes with every request of an application


class GrammarState:
    """Where one answer stands in its grammar. Owned by the engine thread."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def append(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)

    def fill_allowed(self, words: np.ndarray, row: int) -> None:
        """Write what may follow into ``words[row]``: bit i % 32 of int32 i // 32 stands for token i."""
        fill_next_token_bitmask(self._matcher, words, row)

    @property
    def finished(self) -> bool:
        """Whether the answer is complete and nothing can follow."""
        return bool(self._matcher.is_stopped())

    @property
    def error(self) -> str | None:
        """Why the grammar cannot go on: it is too complex for the library's limits, or a token broke it."""
        return str(self._matcher.get_error()) if self._matcher.is_error() else None


class GrammarCompiler:
    """Compiles grammars for one model's vocabulary. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._for_library: LLTokenizer | None = None  # takes a second for a large vocabulary: made on first use
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: str) -> GrammarState:
        """A fresh state of ``grammar``. Raises InvalidRequestError when it is none, or too complex."""
        with self._lock:
            matcher = self._compiled.get(grammar)
            if matcher is None:
                matcher = self._compile(grammar)
            self._compiled[grammar] = matcher
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > NUM_CACHED:
                self._compiled.popitem(last=False)
            return GrammarState(matcher.deep_copy())

    def _compile(self, grammar: str) -> LLMatcher:
        if self._for_library is None:
            eos_ids = sorted(token_id for token_id in self._tokenizer.eos_token_ids if token_id < self._vocab_size)
            self._for_library = LLTokenizer(self._tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=eos_ids)
        matcher = LLMatcher(self._for_library, grammar, log_level=0)
        if matcher.is_error():
            raise InvalidRequestError(f"the grammar cannot be used: {matcher.get_error()}", "grammar")
        return matcher


def allowed_words(grammars: Sequence[GrammarState], vocab_size: int) -> np.ndarray:
    """What may follow in each grammar, [N, ceil(vocab_size / 32)] int32."""
    words = allocate_token_bitmask(len(grammars), vocab_size)
    for row, grammar in enumerate(grammars):
        grammar.fill_allowed(words, row)
    return words
