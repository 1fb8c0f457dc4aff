"""A weight is data first: its name in the checkpoint and its shape, checked before anything is copied."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be served, in one sentence that names the file or tensor."""


class Init(Enum):
    """How a random checkpoint draws a tensor."""

    NORMAL = "normal"  # standard deviation 0.02, as Hugging Face's initializer_range
    ONES = "ones"
    ZEROS = "zeros"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a checkpoint under its Hugging Face name."""

    name: str
    shape: tuple[int, ...]
    init: Init = Init.NORMAL


class WeightSource(Protocol):
    """Where weights come from: a checkpoint on disk or a seed."""

    def get(self, spec: TensorSpec) -> Tensor:
        """The tensor, on whichever device the source has it, shape as specified. Raises CheckpointError."""
        ...
