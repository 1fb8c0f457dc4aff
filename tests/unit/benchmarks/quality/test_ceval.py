"""C-Eval's prompts: five worked examples of the same subject, then the question; read from either form of the data."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.quality.questions import Question, accuracy, make_request
from benchmarks.quality.scoring import Request, TokenScore
from benchmarks.quality.tasks import load_task

SUBJECTS = {"logic": "逻辑学", "law": "法学"}


def row(subject: str, split: str, number: int) -> dict[str, str]:
    choices = {letter: f"{letter}-{number}" for letter in "ABCD"}
    return {"id": str(number), "question": f"{subject} {split} {number}? "} | choices | {"answer": "ABCD"[number % 4]}


def write_json(directory: Path, split: str, count: int) -> None:
    rows = [{"subject": subject} | row(subject, split, n) for n in range(count) for subject in SUBJECTS]
    with gzip.open(directory / f"ceval_{split}.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(content) + "\n" for content in rows)


def write_tables(directory: Path, split: str, count: int) -> None:
    folder = directory / "ceval" / split
    folder.mkdir(parents=True)
    for subject in SUBJECTS:
        rows = [row(subject, split, n) for n in range(count)]
        with (folder / f"{subject}_{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def text(subject: str, split: str, number: int) -> str:
    return f"{subject} {split} {number}?\nA. A-{number}\nB. B-{number}\nC. C-{number}\nD. D-{number}\n答案："


@pytest.mark.parametrize("write", [write_json, write_tables])
def test_a_question_follows_its_subjects_five_examples(tmp_path: Path, write) -> None:
    write(tmp_path, "dev", 5)
    write(tmp_path, "val", 7)
    questions = load_task("ceval", tmp_path)
    assert len(questions) == 14
    question = next(q for q in questions if q.context == text("logic", "val", 6))
    shots = "".join(f"{text('logic', 'dev', n)}{'ABCD'[n % 4]}\n\n" for n in range(5))
    header = "以下是中国关于逻辑学考试的单项选择题，请选出其中的正确答案。\n\n"
    assert question.prompt(list, None) == header + shots + text("logic", "val", 6)
    assert question.choices == ("A", "B", "C", "D") and question.answer == 2


def test_the_examples_alone_are_asked_after_one_another(tmp_path: Path) -> None:
    write_json(tmp_path, "dev", 5)
    questions = load_task("ceval", tmp_path)
    assert len(questions) == 10
    for question in questions:
        assert len(question.shots) == 4 and not any(question.context in shot for shot in question.shots)


def test_without_examples_it_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="ceval_dev"):
        load_task("ceval", tmp_path)


def test_the_first_examples_go_if_the_prompt_is_too_long() -> None:
    question = Question("Q", ("yes", "no"), 0, header="H", shots=("aaaa", "bbb", "cc"))
    longest = {n: question.prompt(list, n) for n in (14, 13, 12, 10, 9, 4, 1)}
    assert longest[14] == "HaaaabbbccQ"
    assert longest[13] == longest[10] == "HbbbccQ"
    assert longest[9] == "HccQ"
    assert longest[4] == longest[1] == "HQ"


def test_the_likeliest_letter_is_the_answer_given() -> None:
    class Likes:
        """Finds one letter likelier than the others."""

        def __init__(self, letter: str) -> None:
            self.letter = letter

        def score(self, requests: Sequence[Request]) -> list[float]:
            return [0.0 if request.ids[request.start :] == (ord(self.letter),) else -1.0 for request in requests]

        def token_scores(self, requests: Sequence[Request]) -> list[list[TokenScore]]:
            raise NotImplementedError

        def continue_greedily(self, prompts: Sequence[tuple[int, ...]], num_tokens: int) -> list[list[int]]:
            raise NotImplementedError

    def encode(text: str) -> list[int]:
        return [ord(letter) for letter in text]

    questions = [Question("?", tuple("ABCD"), answer) for answer in (0, 1, 1, 3)]
    assert [accuracy(questions, Likes(letter), encode) for letter in "ABC"] == [0.25, 0.5, 0.0]


def test_of_a_prompt_that_is_too_long_the_end_is_asked() -> None:
    whole, cut = (make_request("abcdef", "gh", lambda text: [ord(c) for c in text], limit) for limit in (None, 5))
    assert (bytes(whole.ids), whole.start) == (b"abcdefgh", 6)
    assert (bytes(cut.ids), cut.start) == (b"defgh", 3)
