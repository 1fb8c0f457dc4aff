"""Moves bytes from files to tensors, many pieces at a time, each read once and put straight into its place.

On the CPU a piece of the right dtype is read into the tensor itself. Otherwise it goes through its thread's staging
buffer, which is pinned if the tensor is on a GPU: host memory in use is the buffers, whatever the checkpoint's size.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.weights.manifest import CheckpointError

PIECE_BYTES = 16 << 20
MAX_THREADS = 16


@dataclass(frozen=True, slots=True)
class Piece:
    """A byte range of a file that holds numbers of ``dtype``, and the numbers' place."""

    path: Path
    offset: int  # bytes
    target: Tensor  # [n], contiguous
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.target.numel() * self.dtype.itemsize

    @staticmethod
    def cut(path: Path, offset: int, target: Tensor, dtype: torch.dtype) -> list[Piece]:
        """Pieces of at most PIECE_BYTES that fill ``target`` [n]."""
        step = PIECE_BYTES // dtype.itemsize
        return [
            Piece(path, offset + start * dtype.itemsize, target[start : start + step], dtype)
            for start in range(0, len(target), step)
        ]


def read_pieces(pieces: Sequence[Piece], advance: Callable[[int], None]) -> None:
    """Read all pieces; ``advance`` is told each one's bytes in its target. Raises CheckpointError."""
    if not pieces:
        return
    device = pieces[0].target.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the targets' memory may have been something else's until now
    files = {path: os.open(path, os.O_RDONLY) for path in {piece.path for piece in pieces}}
    own = threading.local()

    def read(piece: Piece) -> None:
        if not hasattr(own, "reader"):
            own.reader = _Reader(device)
        own.reader.read(files[piece.path], piece)
        advance(piece.target.nbytes)

    pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1, len(pieces)), "weights")
    try:
        in_file_order = sorted(pieces, key=lambda piece: (piece.path, piece.offset))
        for _ in pool.map(read, in_file_order):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
        for file in files.values():
            os.close(file)


class _Reader:
    """One thread's staging buffer and, on a GPU, its stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._staging: Tensor | None = None

    def read(self, file: int, piece: Piece) -> None:
        if self._stream is None and piece.target.dtype is piece.dtype:
            _read_exactly(file, piece, piece.target)
            return
        if self._staging is None:
            self._staging = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=self._stream is not None)
        staged = self._staging[: piece.num_bytes].view(piece.dtype)
        _read_exactly(file, piece, staged)
        with torch.cuda.stream(self._stream):  # no stream: does nothing
            piece.target.copy_(staged, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()  # the buffer is free again


def _read_exactly(file: int, piece: Piece, into: Tensor) -> None:
    buffer = memoryview(into.view(torch.uint8).numpy().data)
    done = 0
    while done < len(buffer):
        try:
            num_read = os.preadv(file, [buffer[done:]], piece.offset + done)
        except OSError as error:
            raise CheckpointError(f"cannot read {piece.path}: {error}") from error
        if num_read == 0:
            raise CheckpointError(f"{piece.path} ends at byte {piece.offset + done}: it was cut while being read")
        done += num_read
