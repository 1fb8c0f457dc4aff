"""The united part of a model's packed expert tables: which rows hold which way, and how they are filled and replaced.

Legend: E original experts, U united experts, L layers. Rows 0..E-1 of every table are the originals and never change;
the rows behind them are handed out to ways, the same rows in every layer. Layers are filled one at a time, weights and
map together, so that between two steps every layer is whole: with the old united experts, or with the new ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.config import WAYS
from engine.moe.experts import PackedExperts
from engine.moe.united import ArtefactError, UnitedLayers, num_united

WAY_ROW = {1: 0} | {way: row for row, way in enumerate(WAYS, start=1)}  # way |-> row of ``united_of``


def rows_for(ways: tuple[int, ...], num_experts: int) -> int:
    """Packed rows that united experts of these ways take."""
    return sum(num_united(num_experts, way) for way in ways)


class UnitedTable:
    """``experts`` are the tables of the layers that may be dimmed.

    ``united_of`` [L, 1 + len(WAYS), E]: packed id of the united expert of an original, or the original itself where
    there is none; row 0 is exact. The dimmer reads the same tensor.
    """

    def __init__(self, experts: Mapping[int, PackedExperts], united_of: Tensor) -> None:
        self._experts = experts
        self._united_of = united_of
        some = next(iter(experts.values()))
        self._first_row, self._end_row = some.num_originals, len(some.gate_up)
        self._start: dict[int, int] = {}  # way |-> its first row

    @property
    def ways(self) -> tuple[int, ...]:
        return tuple(sorted(self._start))

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self._experts)

    def check_room(self, way: int, replaces: int | None = None) -> None:
        """Raises ArtefactError unless :meth:`make_room` would succeed."""
        self._place(way, replaces)

    def make_room(self, way: int, replaces: int | None = None) -> None:
        """Give ``way`` its rows, taking over those of the way it ``replaces``; its layers are empty until loaded.

        Raises ArtefactError if there is no room; then nothing has changed. A way that has its rows keeps them.
        """
        start = self._place(way, replaces)
        if replaces is not None and replaces in self._start:
            self.forget(replaces)
        self._start[way] = start

    def forget(self, way: int) -> None:
        """Give up a way's rows: nothing is dimmed by it any more."""
        del self._start[way]
        self._united_of[:, WAY_ROW[way]] = self._united_of[:, 0]

    def _place(self, way: int, replaces: int | None) -> int:
        """The first row that ``way`` has or would get."""
        if way in self._start:
            return self._start[way]
        size = num_united(self._first_row, way)
        start = self._first_row
        for other, first in sorted(self._start.items(), key=lambda item: item[1]):
            if other == replaces:
                continue
            if start + size <= first:
                break
            start = first + num_united(self._first_row, other)
        if start + size > self._end_row:
            raise ArtefactError(
                f"{way}-way united experts need {size} rows of each layer's table, and fewer are free; "
                "allowed: a way that is loaded, in the place of one that is larger, or a larger brownout.united_rows"
            )
        return start

    def load_layer(self, source: UnitedLayers, layer: int) -> None:
        """Fill the rows of ``source.way`` in one layer. Raises ArtefactError; then the layer is as it was."""
        experts, map_ = self._experts[layer], self._united_of[layer, WAY_ROW[source.way]]
        groups = source.groups(layer)
        start = self._start[source.way]
        mapped = torch.arange(map_.shape[0])
        if groups:
            gate_up, down = source.weights(layer, experts)
            for row, members in enumerate(groups, start=start):
                mapped[list(members)] = row
            experts.gate_up[start : start + len(groups)].copy_(gate_up, non_blocking=True)
            experts.down[start : start + len(groups)].copy_(down, non_blocking=True)
        map_.copy_(mapped)
