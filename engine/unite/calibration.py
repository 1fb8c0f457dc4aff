"""Calibration text: what the builder feeds the model to learn which inputs the router sends where."""

from __future__ import annotations

import gzip
import hashlib
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from engine.config import ConfigError

MIN_SEQUENCES = 64
CHARS_PER_TOKEN = 8  # read for each wanted token, so that a window is hardly ever too short
_OPENERS: dict[str, Callable[..., TextIO]] = {".gz": gzip.open, ".xz": lzma.open}


class CalibrationError(ConfigError):
    """A calibration text that cannot be used, in one sentence."""


def read_text(path: Path) -> str:
    """A UTF-8 text, plain, .gz or .xz. Raises CalibrationError."""
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            text: str = file.read()
            return text
    except (OSError, UnicodeError, EOFError, lzma.LZMAError) as error:
        raise CalibrationError(f"calibration text {path} cannot be read: {error}") from error


def cut_sequences(
    texts: Sequence[str], encode: Callable[[str], list[int]], num_sequences: int, num_tokens: int
) -> Tensor:
    """Token ids [S, num_tokens] of windows spread evenly over the texts, S at most ``num_sequences``.

    Raises CalibrationError for fewer than MIN_SEQUENCES: builds fitted on less text collapse (MergeMoE,
    arXiv 2510.14436, finds it below 32 sequences).
    """
    window = num_tokens * CHARS_PER_TOKEN
    total = sum(map(len, texts))
    sequences = []
    for text in texts:
        wanted = min(round(num_sequences * len(text) / total), len(text) // window)
        for index in range(wanted):
            start = (len(text) - window) * index // max(1, wanted - 1)
            ids = encode(text[start : start + window])[:num_tokens]
            if len(ids) == num_tokens:
                sequences.append(ids)
    if len(sequences) < MIN_SEQUENCES:
        raise CalibrationError(
            f"the calibration text gives {len(sequences)} sequences of {num_tokens} tokens, and at least "
            f"{MIN_SEQUENCES} are needed: united experts fitted on less do not hold on other text"
        )
    return torch.tensor(sequences)


def sequences_digest(sequences: Tensor) -> str:
    """Names a calibration set: SHA-256 of its token ids."""
    return hashlib.sha256(sequences.to(torch.int32).cpu().numpy().tobytes()).hexdigest()
