"""A weight is data first: its checkpoint name, its shape, where it goes; all checked before anything is copied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod
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

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Part:
    """Where a checkpoint tensor lies in a parameter: from ``first_row`` on, of entry ``entry`` if there are several."""

    spec: TensorSpec
    first_row: int = 0
    entry: int | None = None

    def of(self, parameter: Tensor) -> Tensor:
        """The contiguous view that the tensor fills."""
        rows = parameter if self.entry is None else parameter[self.entry]
        return rows[self.first_row : self.first_row + self.spec.shape[0]]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of the running model, and the checkpoint tensors that fill it."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_filled(self) -> int:
        """Entries of the first dimension that the parts fill; what lies behind is kept free."""
        last = self.parts[-1]
        return last.first_row + last.spec.shape[0] if last.entry is None else last.entry + 1


def stack(*specs: TensorSpec) -> Parameter:
    """A parameter that holds the tensors one below the other."""
    parts, num_rows = [], 0
    for spec in specs:
        parts.append(Part(spec, num_rows))
        num_rows += spec.shape[0]
    return Parameter((num_rows, *specs[0].shape[1:]), tuple(parts))


@dataclass(frozen=True, slots=True)
class Target:
    """A checkpoint tensor and the memory that waits for it, of the model's dtype on the model's device."""

    spec: TensorSpec
    tensor: Tensor


class WeightSource(Protocol):
    """Where weights come from: a checkpoint on disk or a seed."""

    def fill(self, targets: Sequence[Target], advance: Callable[[int], None]) -> None:
        """Write every target; ``advance`` is told the bytes of each piece, from any thread.

        The targets are all that the model has. Raises CheckpointError.
        """
        ...
