"""Result files: what was measured, with the command, machine and versions that produced it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import environment

RESULTS = Path(__file__).resolve().parent / "results"


def result_file(text: str) -> Path:
    """A command's ``--out`` that names a file: found wanting before the measurement, not after it."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; give a file in it")
    return path


def write_result(path: Path, figures: dict[str, Any]) -> None:
    """Writes ``figures`` and the environment as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**figures, **environment.describe()}, indent=2, allow_nan=False) + "\n")


def update_result(path: Path, figures: Mapping[str, Any]) -> None:
    """Writes ``figures`` into a file that several benchmarks fill, each with its own command; mappings are merged."""
    old: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    described = environment.describe()
    commands = sorted({*old.get("commands", ()), described.pop("command")})
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = {**_merge(old, figures), **described, "commands": commands}
    path.write_text(json.dumps(merged, indent=2, allow_nan=False) + "\n")


def _merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _merge(old[key], new[key]) for key in old.keys() & new.keys() if isinstance(old[key], dict)}
    return {**old, **new, **both}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal and for a README."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
