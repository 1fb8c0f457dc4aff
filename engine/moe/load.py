"""How the experts are loaded: pairs per expert and active experts per layer, counted where the routing is.

Counting and adding up stay on the device, without waiting for it; the totals are copied to the host now and then.
L layers, N packed experts in the layer that has most. In a layer with n packed experts an id of n means "no expert".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.telemetry import ExpertLoad

NUM_HOT = 4  # experts named per layer


class ExpertCounter:
    """One per model. `count_` in each layer, `end_step_` after each forward pass, `take` from the same thread.

    Kernels that know the counts anyway add to `totals`.
    """

    def __init__(self, num_packed: Mapping[int, int], device: torch.device) -> None:
        """``num_packed``: layer |-> packed experts, of the layers that have any."""
        pinned = device.type == "cuda"
        self._layers = tuple(num_packed)
        self._row_of = {layer: row for row, layer in enumerate(num_packed)}
        sizes = tuple(num_packed.values())
        num_columns = 2 * (max(sizes) // 2 + 1)  # even, so that each row begins where kernels load whole vectors
        self._step = torch.zeros(len(sizes), num_columns, dtype=torch.int64, device=device)
        columns = torch.arange(self._step.shape[1] - 1, device=device)
        self._is_expert = (columns < torch.tensor(sizes, device=device)[:, None]).long()  # [L, N]
        self._num_packed = np.asarray(sizes)
        # Pairs by expert since the start; the last column: sum over steps of the experts active in the layer.
        self._total = torch.zeros_like(self._step)
        self._copied = torch.zeros(self._step.shape, dtype=torch.int64, pin_memory=pinned)
        self._copied_steps = 0
        self._taken: np.ndarray = np.zeros(self._step.shape, dtype=np.int64)
        self._taken_steps = 0
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        self._num_steps = 0

    def count_(self, layer: int, ids: Tensor) -> None:
        """Add the pairs ``ids`` [T, A] that the layer's experts are about to compute."""
        self._step[self._row_of[layer]].index_add_(0, ids.flatten(), self._one.expand(ids.numel()))

    def totals(self, layer: int) -> Tensor:
        """[> packed experts] int64, for a kernel to add a step's pairs by expert to, and to the last entry the number
        of active experts; instead of `count_`, and then `note_step` ends the step."""
        return self._total[self._row_of[layer]]

    def note_step(self) -> None:
        """A step has been launched whose kernels add to the totals themselves."""
        self._num_steps += 1

    def end_step_(self) -> None:
        """Add the step to the totals."""
        pairs = self._step[:, :-1] * self._is_expert
        self._total[:, :-1] += pairs
        self._total[:, -1] += (pairs > 0).sum(dim=1)
        self._step.zero_()
        self._num_steps += 1

    def reset_(self) -> None:
        """Forget what was counted so far: steps that served nobody."""
        self._step.zero_()
        self._total.zero_()

    def take(self) -> ExpertLoad | None:
        """The steps between the two copies before; starts a new copy. None if there were none.

        The copy is read at the next call: by then a step's own results have been waited for, and with them the copy.
        """
        counts, num_steps = self._copied.numpy().copy(), self._copied_steps
        new, new_steps = counts - self._taken, num_steps - self._taken_steps
        self._taken, self._taken_steps = counts, num_steps
        self._copied.copy_(self._total, non_blocking=True)
        self._copied_steps = self._num_steps
        if not new_steps:
            return None
        return summarise(self._layers, new[:, :-1], new[:, -1], self._num_packed, new_steps)


def summarise(
    layers: Sequence[int], pairs: np.ndarray, active: np.ndarray, num_packed: np.ndarray, num_steps: int
) -> ExpertLoad:
    """``pairs`` [L, N] and ``active`` [L] are sums over the steps, ``num_packed`` is [L]."""
    totals = np.maximum(pairs.sum(axis=1), 1)
    squares = np.maximum((pairs.astype(float) ** 2).sum(axis=1), 1.0)
    balance = np.minimum(totals.astype(float) ** 2 / (num_packed * squares), 1.0)
    num_hot = min(NUM_HOT, pairs.shape[1])
    hot = np.argsort(-pairs, axis=1, kind="stable")[:, :num_hot]
    return ExpertLoad(
        layer=tuple(layers),
        active_experts=tuple((active / num_steps).tolist()),
        balance_index=tuple(balance.tolist()),
        num_hot=num_hot,
        hot_expert=tuple(hot.flatten().tolist()),
        hot_share=tuple((np.take_along_axis(pairs, hot, axis=1) / totals[:, None]).flatten().tolist()),
    )
