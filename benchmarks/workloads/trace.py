"""Recorded traces: a CSV with the columns ``arrival_s,input_tokens,output_tokens``."""

from __future__ import annotations

import csv
from pathlib import Path

COLUMNS = ("arrival_s", "input_tokens", "output_tokens")


def read_rows(path: Path) -> list[tuple[float, int, int]]:
    """(arrival_s, prompt tokens, output tokens) of each request. Raises ValueError that names column or line."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} lacks the columns {', '.join(missing)}; a trace has {', '.join(COLUMNS)}")
        try:
            return [(float(r["arrival_s"]), int(r["input_tokens"]), int(r["output_tokens"])) for r in reader]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
