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

from engine.weights.fp8 import CODE_DTYPE, CODE_NAME, Block, expand_scales, scale_spec
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
    """All tensors of a directory by name. Opening it reads every header: a damaged file is found at once.

    ``block``: of fp8 matrices, if the config says that the checkpoint has any.
    """

    def __init__(self, directory: Path, block: Block | None = None) -> None:
        self._directory = directory
        self._block = block
        self._stored: dict[str, StoredTensor] = {}
        for path in checkpoint_files(directory):
            self._stored |= read_header(path)

    def check(self, specs: Iterable[TensorSpec], tied: bool = False) -> None:
        """Raises CheckpointError for tensors that are missing, not expected, or of another shape or type.

        ``tied``: the output layer is the embedding; a copy of it in the checkpoint is ignored.
        """
        wanted = {spec.name: spec for spec in specs}
        wanted |= {spec.name: spec for spec in map(self._scales_of, wanted.values()) if spec is not None}
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

    def _scales_of(self, spec: TensorSpec) -> TensorSpec | None:
        """The scales that a tensor needs, if it is stored as fp8."""
        stored = self._stored.get(spec.name)
        if self._block is None or stored is None or stored.dtype != CODE_NAME or len(spec.shape) != len(self._block):
            return None
        return scale_spec(spec, self._block)

    def _check_tensor(self, spec: TensorSpec, stored: StoredTensor) -> None:
        if stored.shape != spec.shape:
            raise CheckpointError(
                f"tensor {spec.name} in {stored.path} has shape {stored.shape}, the config implies {spec.shape}"
            )
        if stored.dtype not in DTYPES and self._scales_of(spec) is None:
            raise CheckpointError(
                f"tensor {spec.name} in {stored.path} is {stored.dtype}; allowed: {', '.join(DTYPES)}"
            )

    def fill(self, targets: Sequence[Target], advance: Callable[[int], None]) -> None:
        """Stream every target's bytes to its place. Call ``check`` first."""
        read_pieces([piece for target in targets for piece in self._pieces(target)], advance)
        scaled = [(target, spec) for target in targets if (spec := self._scales_of(target.spec)) is not None]
        scales = [Target(spec, target.tensor.new_empty(spec.shape, dtype=torch.float32)) for target, spec in scaled]
        read_pieces([piece for target in scales for piece in self._pieces(target)], lambda num_bytes: None)
        for (target, _), of_blocks in zip(scaled, scales, strict=True):
            assert self._block is not None
            rows, columns = target.spec.shape
            target.tensor.mul_(expand_scales(of_blocks.tensor, self._block, (rows, columns)))

    def _pieces(self, target: Target) -> list[Piece]:
        stored = self._stored[target.spec.name]
        dtype = CODE_DTYPE if stored.dtype == CODE_NAME else DTYPES[stored.dtype]
        return Piece.cut(stored.path, stored.offset, target.tensor.view(-1), dtype)


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
