"""Loads a model: memory for every parameter at its final place, then one pass that fills it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.models.layout import checkpoint_tensors, model_parameters
from engine.models.spec import ModelSpec
from engine.progress import byte_progress
from engine.weights.manifest import Target, WeightSource
from engine.weights.random import RandomWeights
from engine.weights.safetensors import SafetensorsCheckpoint


def open_source(config: ModelConfig, spec: ModelSpec, device: torch.device) -> WeightSource:
    """The source that the configuration names, checked against the spec. Raises CheckpointError; reads no weights."""
    if config.load_format == "random":
        return RandomWeights(config.seed, device)
    checkpoint = SafetensorsCheckpoint(Path(config.path), spec.fp8_block)
    checkpoint.check(checkpoint_tensors(spec), spec.tie_word_embeddings)
    return checkpoint


def weights_bytes(spec: ModelSpec, dtype: torch.dtype, num_united: Mapping[int, int]) -> int:
    """What the parameters will take on the device; ``num_united`` as in model_parameters."""
    return dtype.itemsize * sum(p.num_elements for p in model_parameters(spec, num_united).values())


def load_weights(
    spec: ModelSpec,
    source: WeightSource,
    num_united: Mapping[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    """Parameter key |-> tensor; the rows for united experts are 0. Raises CheckpointError."""
    tensors: dict[str, Tensor] = {}
    targets: list[Target] = []
    for key, parameter in model_parameters(spec, num_united).items():
        tensors[key] = torch.empty(parameter.shape, dtype=dtype, device=device)
        targets += [Target(part.spec, part.of(tensors[key])) for part in parameter.parts]
        tensors[key][parameter.num_filled :] = 0
    with byte_progress("loading weights", sum(target.tensor.nbytes for target in targets)) as advance:
        source.fill(targets, advance)
    return tensors
