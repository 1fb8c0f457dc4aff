"""C-Eval (arXiv 2305.08322) five-shot, in its authors' wording: each question after its subject's five worked examples.

Read from ``ceval_dev.jsonl.gz`` and ``ceval_val.jsonl.gz`` (a row: subject, question, A to D, answer), or from the
folders of the official ``ceval-exam.zip`` unpacked as ``ceval/``: dev/SUBJECT_dev.csv and val/SUBJECT_val.csv. The test
set's answers are not public; the paper's numbers are the val set's. With the dev set alone, each of its questions is
asked after the subject's other four.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.questions import Question
from benchmarks.training.corpus import read_rows

LETTERS = "ABCD"
HEADER = "以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n"
SUBJECTS: dict[str, str] = json.loads((Path(__file__).parent / "ceval_subjects.json").read_text())


def load(directory: Path) -> list[Question]:
    """Raises SystemExit if the worked examples are missing."""
    examples = _rows(directory, "dev")
    if not examples:
        raise SystemExit(f"{directory} has no ceval_dev.jsonl.gz and no ceval/dev/*_dev.csv")
    asked = _rows(directory, "val") or examples
    return [_question(row, [e for e in examples if e["subject"] == row["subject"] and e is not row]) for row in asked]


def _question(row: dict[str, Any], examples: Sequence[dict[str, Any]]) -> Question:
    return Question(
        _text(row),
        tuple(LETTERS),
        LETTERS.index(row["answer"]),
        header=HEADER.format(subject=SUBJECTS[row["subject"]]),
        shots=tuple(f"{_text(example)}{example['answer']}\n\n" for example in examples),
    )


def _text(row: dict[str, Any]) -> str:
    options = "\n".join(f"{letter}. {row[letter]}" for letter in LETTERS)
    return f"{row['question'].strip()}\n{options}\n答案："


def _rows(directory: Path, split: str) -> list[dict[str, Any]]:
    path = directory / f"ceval_{split}.jsonl.gz"
    if path.exists():
        return read_rows(path)
    rows: list[dict[str, Any]] = []
    for table in sorted((directory / "ceval" / split).glob(f"*_{split}.csv")):
        subject = table.name.removesuffix(f"_{split}.csv")
        with table.open(newline="", encoding="utf-8") as file:
            rows += [{"subject": subject} | row for row in csv.DictReader(file)]
    return rows
