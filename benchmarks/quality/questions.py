"""Multiple-choice questions, and what is asked of a scorer for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.quality.scoring import Request, Scorer

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Question:
    """Asked as header, worked examples and context; the choices are continuations of that."""

    context: str
    choices: tuple[str, ...]
    answer: int
    header: str = ""
    shots: tuple[str, ...] = ()

    def prompt(self, encode: Encode, max_tokens: int | None) -> str:
        """The whole prompt; the first examples are left out if it would not fit with its longest choice."""
        for first in range(len(self.shots)):
            prompt = self.header + "".join(self.shots[first:]) + self.context
            if max_tokens is None or max(len(encode(prompt + choice)) for choice in self.choices) <= max_tokens:
                return prompt
        return self.header + self.context


def make_request(context: str, continuation: str, encode: Encode, max_tokens: int | None = None) -> Request:
    """Token ids of both, and where the continuation starts; of what is too long, the end (as lm-evaluation-harness)."""
    ids = encode(context + continuation)
    start = min(len(encode(context)), len(ids) - 1)
    first = 0 if max_tokens is None else max(0, len(ids) - max_tokens)
    return Request(tuple(ids[first:]), max(1, start - first))


def accuracy(questions: Sequence[Question], scorer: Scorer, encode: Encode, max_tokens: int | None = None) -> float:
    """Share of questions whose right choice has the highest log-likelihood per byte. ``max_tokens``: of a prompt."""
    requests, lengths = [], []
    for question in questions:
        prompt = question.prompt(encode, max_tokens)
        for choice in question.choices:
            requests.append(make_request(prompt, choice, encode, max_tokens))
            lengths.append(len(choice.encode()))
    scores = [score / length for score, length in zip(scorer.score(requests), lengths, strict=True)]
    num_right, start = 0, 0
    for question in questions:
        own = scores[start : start + len(question.choices)]
        num_right += own.index(max(own)) == question.answer
        start += len(question.choices)
    return num_right / len(questions)
