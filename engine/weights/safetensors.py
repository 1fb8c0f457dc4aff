"""Weights of a Hugging Face directory: one model.safetensors, or shards with an index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.weights.manifest import CheckpointError, TensorSpec

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class SafetensorsCheckpoint:
    """Reads tensors by name, memory-mapped, one at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file_of = self._index(directory)  # tensor name |-> file
        self._open: dict[Path, Any] = {}

    def get(self, spec: TensorSpec) -> Tensor:
        path = self._file_of.get(spec.name)
        if path is None:
            raise CheckpointError(f"checkpoint {self._directory} has no tensor {spec.name}")
        try:
            tensor: Tensor = self._reader(path).get_tensor(spec.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read tensor {spec.name} from {path}: {error}") from error
        if tuple(tensor.shape) != spec.shape:
            raise CheckpointError(
                f"tensor {spec.name} in {path} has shape {tuple(tensor.shape)}, the config implies {spec.shape}"
            )
        return tensor

    def _reader(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = _open_file(path)
        return self._open[path]

    @staticmethod
    def _index(directory: Path) -> dict[str, Path]:
        index_path = directory / INDEX_FILE
        if index_path.exists():
            try:
                weight_map: dict[str, str] = json.loads(index_path.read_text())["weight_map"]
                file_of = {name: directory / file for name, file in weight_map.items()}
            except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
                raise CheckpointError(f"cannot read {index_path}: {error!r}") from error
            for path in sorted(set(file_of.values())):
                if not path.exists():
                    raise CheckpointError(f"checkpoint file {path} is missing (named in {INDEX_FILE})")
            return file_of
        path = directory / SINGLE_FILE
        if not path.exists():
            raise CheckpointError(
                f"checkpoint file {path} is missing; to serve random weights, set model.load_format to random"
            )
        return dict.fromkeys(_open_file(path).keys(), path)


def check_checkpoint(directory: Path) -> None:
    """Open every file's header. Raises CheckpointError for a missing, truncated or corrupt file; reads no weights."""
    for path in sorted(set(SafetensorsCheckpoint._index(directory).values())):
        _open_file(path)


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a valid safetensors file: {error}") from error
