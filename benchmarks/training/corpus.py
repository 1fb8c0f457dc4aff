"""Text for training and measuring: read, its line breaks undone, and cut into token ids."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from engine.unite.calibration import read_text

BLOCK_CHARS = 100_000  # encoded at a time, many in parallel
END_OF_DOCUMENT = "<|endoftext|>"
_LINE_BREAK = re.compile(r"(?<![\n>])\n(?!\n)[ \t]*")  # one that only wraps a paragraph


def read_rows(path: Path) -> list[dict]:
    """The rows of a .jsonl or .jsonl.gz file."""
    return [json.loads(line) for line in read_text(path).split("\n") if line]


def unwrap(text: str) -> str:
    """Paragraphs on one line each: books are wrapped at 70 columns, which no model should learn."""
    return _LINE_BREAK.sub(" ", text)


def blocks(text: str) -> Iterator[str]:
    """Pieces of about BLOCK_CHARS that end between two paragraphs."""
    start = 0
    while start < len(text):
        end = text.find("\n\n", start + BLOCK_CHARS)
        end = len(text) if end < 0 else end + 2
        yield text[start:end]
        start = end


def encode(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Token ids [N] uint16, on all cores. The text ends with the end-of-document token."""
    encoded = tokenizer.encode_batch_fast(list(blocks(text)), add_special_tokens=False)
    ids = [np.asarray(part.ids, dtype=np.uint16) for part in encoded]
    end = np.asarray([tokenizer.token_to_id(END_OF_DOCUMENT)], dtype=np.uint16)
    return np.concatenate([*ids, end])


def load_tokens(paths: list[Path], tokenizer: Tokenizer) -> np.ndarray:
    """Token ids [N] uint16 of texts, or of saved arrays of ids (.npy)."""
    return np.concatenate(
        [np.load(path) if path.suffix == ".npy" else encode(unwrap(read_text(path)), tokenizer) for path in paths]
    )


def windows(tokens: np.ndarray, num_sequences: int, num_tokens: int) -> Tensor:
    """[S, T] int64: sequences spread evenly over the tokens, none overlapping."""
    possible = len(tokens) // num_tokens
    if possible < num_sequences:
        raise SystemExit(f"the text holds {possible} sequences of {num_tokens} tokens; {num_sequences} are wanted")
    starts = [possible * i // num_sequences * num_tokens for i in range(num_sequences)]
    return torch.from_numpy(np.stack([tokens[s : s + num_tokens] for s in starts]).astype(np.int64))
