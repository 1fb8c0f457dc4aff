"""Writes a checkpoint with random weights as an ordinary Hugging Face directory, for tests and performance runs.

Every tensor's place is known before the first is drawn, so threads draw and write them in any order, and memory holds
one tensor per thread. What ``model.load_format: random`` serves with the same seed on the same kind of device is this
checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.models.layout import checkpoint_tensors
from engine.models.registry import load_spec
from engine.models.spec import read_config
from engine.progress import GIB, byte_progress
from engine.weights.manifest import CheckpointError, TensorSpec
from engine.weights.random import RandomWeights
from engine.weights.safetensors import DTYPES, INDEX_FILE, SINGLE_FILE

MAX_THREADS = 16
HEADER_ALIGNMENT = 8  # bytes; safetensors pads with spaces
# What a directory may hold besides config and weights: the tokenizer's files, of whichever kind.
COMPANIONS = ("*token*", "vocab.*", "merges.txt", "generation_config.json", "chat_template.*")


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: tensors of one dtype, back to back."""

    name: str
    tensors: tuple[TensorSpec, ...]


def plan_shards(tensors: Sequence[TensorSpec], itemsize: int, max_bytes: int) -> list[Shard]:
    """The tensors in order, in as few files of at most ``max_bytes`` as that allows; a larger tensor has its own."""
    groups: list[list[TensorSpec]] = []
    used_bytes = 0
    for spec in tensors:
        num_bytes = spec.num_elements * itemsize
        if not groups or used_bytes + num_bytes > max_bytes:
            groups.append([])
            used_bytes = 0
        groups[-1].append(spec)
        used_bytes += num_bytes
    if len(groups) == 1:
        return [Shard(SINGLE_FILE, tuple(groups[0]))]
    return [
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


def write_random_checkpoint(
    config_directory: Path, out: Path, dtype: torch.dtype, seed: int, device: torch.device, shard_bytes: int
) -> list[Path]:
    """Write weights, index, config.json and the tokenizer's files to ``out``; returns the weight files.

    Raises ConfigError for a config that cannot be served, CheckpointError if ``out`` is taken or the disk is too small.
    """
    spec = load_spec(config_directory)
    shards = plan_shards(checkpoint_tensors(spec), dtype.itemsize, shard_bytes)
    total_bytes = sum(tensor.num_elements for shard in shards for tensor in shard.tensors) * dtype.itemsize
    with _new_directory(out, total_bytes):
        with byte_progress(f"writing {out}", total_bytes) as advance:
            _write_shards(shards, out, RandomWeights(seed, device), dtype, advance)
        if len(shards) > 1:
            weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
            index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
            (out / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
        for pattern in COMPANIONS:
            for path in config_directory.glob(pattern):
                shutil.copyfile(path, out / path.name)
        config = read_config(config_directory)
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return [out / shard.name for shard in shards]


@contextmanager
def _new_directory(out: Path, total_bytes: int) -> Iterator[None]:
    """A directory that is either finished or gone."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists already and is not an empty directory; allowed: a new directory")
    try:
        out.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(out).free
        if free_bytes < total_bytes:
            raise CheckpointError(
                f"the checkpoint takes {total_bytes / GIB:.1f} GiB, and {free_bytes / GIB:.1f} GiB are free at {out}"
            )
        yield
    except OSError as error:
        shutil.rmtree(out, ignore_errors=True)
        raise CheckpointError(f"cannot write {out}: {error}") from error
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise


def _write_shards(
    shards: Sequence[Shard], out: Path, source: RandomWeights, dtype: torch.dtype, advance: Callable[[int], None]
) -> None:
    def write(file: int, offset: int, spec: TensorSpec) -> None:
        tensor = source.get(spec).to(dtype).cpu()
        _write_exactly(file, offset, memoryview(tensor.view(-1).view(torch.uint8).numpy().data))
        advance(tensor.nbytes)

    with ExitStack() as stack:
        places = []
        for shard in shards:
            file = os.open(out / shard.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            stack.callback(os.close, file)
            header, offset = _header(shard, dtype)
            _write_exactly(file, 0, memoryview(header))
            for spec in shard.tensors:
                places.append((file, offset, spec))
                offset += spec.num_elements * dtype.itemsize
        # Each thread computes by itself: drawing is not parallel, and threads of threads only get in each other's way.
        pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), "writer", torch.set_num_threads, (1,))
        stack.callback(pool.shutdown, cancel_futures=True)
        for _ in pool.map(lambda place: write(*place), places):
            pass


def _header(shard: Shard, dtype: torch.dtype) -> tuple[bytes, int]:
    """The file's first bytes, and how many there are: the offset of the first tensor."""
    code = next(code for code, known in DTYPES.items() if known is dtype)
    rows: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for spec in shard.tensors:
        end = start + spec.num_elements * dtype.itemsize
        rows[spec.name] = {"dtype": code, "shape": list(spec.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(rows).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, 8 + len(text)


def _write_exactly(file: int, offset: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], offset + done)
