"""Weights drawn from a seed: for demos, tests and performance runs, where the output's meaning does not matter."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.weights.manifest import Init, Target, TensorSpec

INITIALIZER_RANGE = 0.02  # Hugging Face's default initializer_range
CPU = torch.device("cpu")


class RandomWeights:
    """Each tensor depends only on (seed, name, shape, kind of device), never on the order of reading.

    Norms are 1 and matrices narrow, as before training: every layer's output stays near the scale of its input, and
    logits have a standard deviation of about 0.02 sqrt(hidden size).
    """

    def __init__(self, seed: int, device: torch.device = CPU) -> None:
        self._seed = seed
        self._device = device

    def fill(self, targets: Sequence[Target], advance: Callable[[int], None]) -> None:
        for target in targets:
            target.tensor.copy_(self.get(target.spec))
            advance(target.tensor.nbytes)

    def get(self, spec: TensorSpec) -> Tensor:
        """The tensor in float32 on the source's device. Callable from any thread."""
        if spec.init is Init.ONES:
            return torch.ones(spec.shape, device=self._device)
        if spec.init is Init.ZEROS:
            return torch.zeros(spec.shape, device=self._device)
        # One 32-bit number of both: torch's CPU generator ignores the upper half of its seed.
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(spec.name.encode(), self._seed))
        return torch.empty(spec.shape, device=self._device).normal_(0.0, INITIALIZER_RANGE, generator=generator)
