"""Replay of a recorded trace: a CSV with the columns ``arrival_s,input_tokens,output_tokens``."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from benchmarks.workloads.lengths import draw_prompt
from benchmarks.workloads.workload import Arrival, Workload

COLUMNS = ("arrival_s", "input_tokens", "output_tokens")


def load_trace(
    path: Path,
    vocab_size: int,
    seed: int,
    *,
    start_s: float = 0.0,
    end_s: float = float("inf"),
    speed: float = 1.0,
    max_input_tokens: int | None = None,
    max_output_tokens: int | None = None,
) -> Workload:
    """The rows with ``start_s <= arrival_s < end_s``, moved to begin at 0 and played ``speed`` times as fast.

    Prompts are random tokens of the recorded length; longer ones are cut to the given limits.
    Raises ValueError when a column is missing or a row cannot be read.
    """
    rng = np.random.default_rng(seed)
    arrivals: list[Arrival] = []
    last_s = start_s
    for at_s, num_input, num_output in read_rows(path):
        if not start_s <= at_s < end_s:
            continue
        last_s = max(last_s, at_s)
        prompt = draw_prompt(_clamp(num_input, max_input_tokens), vocab_size, rng)
        output = _clamp(num_output, max_output_tokens)
        arrivals.append(Arrival((at_s - start_s) / speed, prompt, output, seed=seed + len(arrivals)))
    duration_s = (last_s if end_s == float("inf") else end_s) - start_s
    return Workload(tuple(sorted(arrivals, key=lambda a: a.at_s)), duration_s / speed)


def read_rows(path: Path) -> list[tuple[float, int, int]]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} lacks the columns {', '.join(missing)}; a trace has {', '.join(COLUMNS)}")
        try:
            return [(float(r["arrival_s"]), int(r["input_tokens"]), int(r["output_tokens"])) for r in reader]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def _clamp(num_tokens: int, limit: int | None) -> int:
    return max(1, num_tokens if limit is None else min(num_tokens, limit))
