"""A model's digest: what artefacts built for one model (united experts, ladders) are recognised by."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

SAMPLE_BYTES = 1 << 20
NUM_SAMPLES = 16  # of each weight file: a fine-tuned copy differs nearly everywhere
COSMETIC_KEYS = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


def model_digest(directory: Path, random_seed: int | None = None) -> str:
    """Digest of config.json and the weights: those drawn from ``random_seed``, else the directory's safetensors.

    Of each file the size, both ends and evenly spread samples count, so that a model of any size takes a moment.
    """
    digest = hashlib.sha256()
    config = json.loads((directory / "config.json").read_text())
    described = {key: value for key, value in config.items() if key not in COSMETIC_KEYS}
    digest.update(json.dumps(described, sort_keys=True).encode())
    if random_seed is not None:
        digest.update(f"random weights, seed {random_seed}".encode())
        return digest.hexdigest()
    for path in sorted(directory.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        _update_sampled(digest, path)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _update_sampled(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    last = max(0, size - SAMPLE_BYTES)
    offsets = sorted({last * i // (NUM_SAMPLES - 1) for i in range(NUM_SAMPLES)})
    with path.open("rb") as file:
        for offset in offsets:
            file.seek(offset)
            digest.update(file.read(SAMPLE_BYTES))
