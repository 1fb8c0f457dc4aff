"""Weights of a Hugging Face directory: one model.safetensors, or shards with an index.

A file is 8 bytes with the length of its header, the header as JSON (name |-> dtype, shape, byte range), and the bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.weights.manifest import CheckpointError, Target, TensorSpec
from engine.weights.stream import Piece, read_pieces

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
UNUSED_SUFFIXES = (".rotary_emb.inv_freq",)  # old Llama checkpoints carry what the config already says
MAX_NAMED = 3  # tensors in an error message


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a file's header describes it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes, from the start of the file


class SafetensorsCheckpoint:
    """All tensors of a directory by name. Opening it reads every header: a damaged file is found at once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stored: dict[str, StoredTensor] = {}
        for path in checkpoint_files(directory):
            self._stored |= read_header(path)

    def check(self, specs: Iterable[TensorSpec], tied: bool = False) -> None:
        """Raises CheckpointError for tensors that are missing, not expected, or of another shape or type.

        ``tied``: the output layer is the embedding; a copy of it in the checkpoint is ignored.
        """
        wanted = {spec.name: spec for spec in specs}
        for name, spec in wanted.items():
            if name in self._stored:
                self._check_tensor(spec, self._stored[name])
        missing = [name for name in wanted if name not in self._stored]
        if missing:
            raise CheckpointError(f"checkpoint {self._directory} has no {_named(missing)}")
        ignored = {*wanted, "lm_head.weight"} if tied else set(wanted)
        unexpected = [name for name in self._stored if name not in ignored and not name.endswith(UNUSED_SUFFIXES)]
        if unexpected:
            raise CheckpointError(
                f"checkpoint {self._directory} has {_named(sorted(unexpected))}, which the config does not imply"
            )

    @staticmethod
    def _check_tensor(spec: TensorSpec, stored: StoredTensor) -> None:
        if stored.shape != spec.shape:
            raise CheckpointError(
                f"tensor {spec.name} in {stored.path} has shape {stored.shape}, the config implies {spec.shape}"
            )
        if stored.dtype not in DTYPES:
            raise CheckpointError(
                f"tensor {spec.name} in {stored.path} is {stored.dtype}; allowed: {', '.join(DTYPES)}"
            )

    def fill(self, targets: Sequence[Target], advance: Callable[[int], None]) -> None:
        """Stream every target's bytes to its place. Call ``check`` first."""
        pieces: list[Piece] = []
        for target in targets:
            stored = self._stored[target.spec.name]
            pieces += Piece.cut(stored.path, stored.offset, target.tensor.view(-1), DTYPES[stored.dtype])
        read_pieces(pieces, advance)


def checkpoint_files(directory: Path) -> list[Path]:
    """The directory's safetensors files, all of which exist."""
    index_path = directory / INDEX_FILE
    if index_path.exists():
        try:
            weight_map: dict[str, str] = json.loads(index_path.read_text())["weight_map"]
            paths = sorted({directory / file for file in weight_map.values()})
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise CheckpointError(f"cannot read {index_path}: {error!r}") from error
        for path in paths:
            if not path.exists():
                raise CheckpointError(f"checkpoint file {path} is missing (named in {INDEX_FILE})")
        return paths
    path = directory / SINGLE_FILE
    if not path.exists():
        raise CheckpointError(
            f"checkpoint file {path} is missing; to serve random weights, set model.load_format to random"
        )
    return [path]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. Raises CheckpointError if it is truncated or damaged."""
    try:
        with safe_open(path, framework="pt", device="cpu"):  # checks that the byte ranges fit shapes and file
            pass
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(header_bytes))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a valid safetensors file: {error}") from error
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(path, row["dtype"], tuple(row["shape"]), 8 + header_bytes + row["data_offsets"][0])
        for name, row in header.items()
    }


def check_checkpoint(directory: Path) -> None:
    """Open every file's header. Raises CheckpointError for a missing, truncated or corrupt file; reads no weights."""
    SafetensorsCheckpoint(directory)


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MAX_NAMED])
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"tensor{'s' if len(names) > 1 else ''} {shown}{more}"
