"""Multiple-choice tasks from local files: prompts in lm-evaluation-harness' wording (C-Eval's in its own),
answers by likelihood.

| task       | asks                                         | choice by log-likelihood | shots |
| ---------- | -------------------------------------------- | ------------------------ | ----- |
| piqa       | Question: GOAL / Answer:                     | per byte                 | 0     |
| copa       | PREMISE because (or therefore)               | per byte                 | 0     |
| openbookqa | STEM                                         | per byte                 | 0     |
| ceval      | the question with options A to D, in Chinese | of the letter            | 5     |
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.quality import ceval
from benchmarks.quality.questions import Question
from benchmarks.training.corpus import read_rows

TASKS = ("piqa", "copa", "openbookqa", "ceval")
LETTERS = "ABCD"


def load_task(name: str, directory: Path, limit: int | None = None) -> list[Question]:
    """The questions of a task from ``directory``, evenly thinned to ``limit``. Raises SystemExit without its file."""
    questions = _LOADERS[name](directory)
    if limit is not None and limit < len(questions):
        questions = [questions[len(questions) * i // limit] for i in range(limit)]
    return questions


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


_LOADERS: dict[str, Callable[[Path], list[Question]]] = {
    "piqa": _piqa,
    "copa": _copa,
    "openbookqa": _openbookqa,
    "ceval": ceval.load,
}
