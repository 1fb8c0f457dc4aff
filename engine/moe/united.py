"""United experts: one expert that stands for several (BrownoutServe, arXiv 2507.17133).

Legend: E original experts, U united experts, D hidden size, F expert FFN width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Grouping:
    """Which originals each united expert of one way stands for; every original belongs to exactly one group."""

    way: int
    groups: tuple[tuple[int, ...], ...]


def consecutive_groups(num_experts: int, way: int) -> Grouping:
    """Balanced groups of neighbours: sizes differ by at most one and never exceed ``way``."""
    num_groups = -(-num_experts // way)
    bounds = [num_experts * g // num_groups for g in range(num_groups + 1)]
    return Grouping(way, tuple(tuple(range(a, b)) for a, b in pairwise(bounds)))


def average_united_(gate_up: Tensor, down: Tensor, groupings: tuple[Grouping, ...], num_originals: int) -> None:
    """Fill the united part of the packed tables [E+U, 2F, D] and [E+U, D, F] with plain averages of the members.

    A baseline: averaging unaligned experts loses about as much quality as dropping them.
    """
    united = num_originals
    for grouping in groupings:
        for members in grouping.groups:
            for table in (gate_up, down):
                table[united] = table[list(members)].float().mean(0).to(table.dtype)
            united += 1
