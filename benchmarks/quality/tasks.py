"""Multiple-choice tasks from local files: prompts in lm-evaluation-harness' wording, answers by likelihood.

| task       | asks                                         | choice by log-likelihood | shots |
| ---------- | -------------------------------------------- | ------------------------ | ----- |
| piqa       | Question: GOAL / Answer:                     | per byte                 | 0     |
| copa       | PREMISE because (or therefore)               | per byte                 | 0     |
| openbookqa | STEM                                         | per byte                 | 0     |
| ceval      | the question with options A to D, in Chinese | of the letter            | 5     |

C-Eval: with ceval_val.jsonl.gz beside the dev set its questions are asked, after the subject's five dev examples. With
the dev set alone each dev question is asked after the subject's other four.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.corpus import read_rows
from benchmarks.quality.scoring import Request, Scorer

TASKS = ("piqa", "copa", "openbookqa", "ceval")
LETTERS = "ABCD"
CEVAL_HEADER = "以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n"


@dataclass(frozen=True, slots=True)
class Question:
    context: str
    choices: tuple[str, ...]  # continuations of the context
    answer: int


def load_task(name: str, directory: Path, limit: int | None = None) -> list[Question]:
    """The questions of a task from ``directory``, evenly thinned to ``limit``. Raises SystemExit without its file."""
    questions = _LOADERS[name](directory)
    if limit is not None and limit < len(questions):
        questions = [questions[len(questions) * i // limit] for i in range(limit)]
    return questions


def accuracy(questions: Sequence[Question], scorer: Scorer, encode: Callable[[str], list[int]]) -> float:
    """Share of questions whose right choice has the highest log-likelihood per byte."""
    requests, lengths = [], []
    for question in questions:
        for choice in question.choices:
            requests.append(make_request(question.context, choice, encode))
            lengths.append(len(choice.encode()))
    scores = [score / length for score, length in zip(scorer.score(requests), lengths, strict=True)]
    num_right, start = 0, 0
    for question in questions:
        own = scores[start : start + len(question.choices)]
        num_right += own.index(max(own)) == question.answer
        start += len(question.choices)
    return num_right / len(questions)


def make_request(context: str, continuation: str, encode: Callable[[str], list[int]]) -> Request:
    """Token ids of both, and where the continuation starts."""
    ids = encode(context + continuation)
    start = min(len(encode(context)), len(ids) - 1)
    return Request(tuple(ids), max(1, start))


def _rows(directory: Path, *names: str) -> list[dict[str, Any]]:
    for name in names:
        if (directory / name).exists():
            return read_rows(directory / name)
    raise SystemExit(f"{directory} has no {' or '.join(names)}")


def _piqa(directory: Path) -> list[Question]:
    return [
        Question(f"Question: {row['goal']}\nAnswer:", (f" {row['sol1']}", f" {row['sol2']}"), row["label"])
        for row in _rows(directory, "piqa_valid.jsonl.gz")
    ]


def _copa(directory: Path) -> list[Question]:
    links = {"cause": "because", "effect": "therefore"}
    return [
        Question(
            f"{row['premise'].strip()[:-1]} {links[row['question']]}",
            tuple(f" {row[name][0].lower()}{row[name][1:]}" for name in ("choice1", "choice2")),
            row["label"],
        )
        for row in _rows(directory, "copa_dev.jsonl.gz")
    ]


def _openbookqa(directory: Path) -> list[Question]:
    return [
        Question(row["question_stem"], tuple(f" {row[letter]}" for letter in LETTERS), LETTERS.index(row["answer"]))
        for row in _rows(directory, "openbookqa_test.jsonl.gz", "openbookqa_train_first1000.jsonl.gz")
    ]


def _ceval(directory: Path) -> list[Question]:
    dev = _rows(directory, "ceval_dev.jsonl.gz")
    asked = _rows(directory, "ceval_val.jsonl.gz") if (directory / "ceval_val.jsonl.gz").exists() else dev
    questions = []
    for row in asked:
        shots = [shot for shot in dev if shot["subject"] == row["subject"] and shot is not row]
        header = CEVAL_HEADER.format(subject=row["subject_zh"])
        context = header + "".join(f"{_ceval_text(shot)}{shot['answer']}\n\n" for shot in shots) + _ceval_text(row)
        questions.append(Question(context, tuple(LETTERS), LETTERS.index(row["answer"])))
    return questions


def _ceval_text(row: dict[str, Any]) -> str:
    options = "\n".join(f"{letter}. {row[letter]}" for letter in LETTERS)
    return f"{row['question'].strip()}\n{options}\n答案："


_LOADERS: dict[str, Callable[[Path], list[Question]]] = {
    "piqa": _piqa,
    "copa": _copa,
    "openbookqa": _openbookqa,
    "ceval": _ceval,
}
