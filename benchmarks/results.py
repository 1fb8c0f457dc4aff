"""Result files: what was measured, with the command, machine and versions that produced it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import environment

RESULTS = Path(__file__).resolve().parent / "results"


def write_result(path: Path, figures: dict[str, Any]) -> None:
    """Writes ``figures`` and the environment as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**figures, **environment.describe()}, indent=2, allow_nan=False) + "\n")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal and for a README."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
