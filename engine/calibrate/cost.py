"""What a setting saves: step times as they are served, with level 0 in turn, so that a drifting clock cancels out.

Whatever else a machine does can only make a step slower, so the fastest quarter of the repeats tells.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.batch import StepRows, to_device
from engine.calibrate.candidates import StepSize
from engine.moe.dimmer import Dimmer
from engine.moe.settings import DimSetting
from engine.pool.slots import ModelSlot
from engine.types import Levels, Phase


class StepTimer:
    """Times steps on real text, because the text decides how many experts a step reads. ``sequences`` [S, T]."""

    def __init__(self, slot: ModelSlot, sequences: Tensor, repeats: int = 5) -> None:
        self._slot, self._sequences, self._repeats = slot, sequences, repeats
        self._dimmer: Dimmer = next(d for d in slot.dimming.dimmers if d is not None)

    @torch.inference_mode()
    def step_frac(self, setting: DimSetting, size: StepSize) -> float:
        """Step time relative to level 0's."""
        self._dimmer.set_settings([DimSetting(), setting])
        steps = self._steps(size)
        if size.phase is Phase.DECODE:
            self._run(self._prompts(size.num_tokens), Levels())  # the context
        for level in (0, 1):
            self._run(steps[0], Levels(level, level))  # the first of a shape pays for lazy initialisation
        times_s: tuple[list[float], list[float]] = ([], [])
        for step in steps:
            for level in (0, 1):
                times_s[level].append(self._run(step, Levels(level, level)))
        return undisturbed_s(times_s[1]) / undisturbed_s(times_s[0])

    def _steps(self, size: StepSize) -> list[StepRows]:
        num_tokens = self._sequences.shape[1]
        if size.phase is Phase.PREFILL:
            return [self._prompts(-(-size.num_tokens // num_tokens))] * self._repeats
        positions = np.linspace(num_tokens // 2, num_tokens - 1, self._repeats).astype(int)
        tables = self._tables(size.num_tokens)
        return [
            StepRows.decodes(
                self._sequences[: size.num_tokens, position].numpy(), np.full(size.num_tokens, position), tables
            )
            for position in positions
        ]

    def _prompts(self, num_sequences: int) -> StepRows:
        part = self._sequences[:num_sequences].numpy()
        return StepRows.prompts(part, self._tables(num_sequences), samples=True)

    def _tables(self, num_sequences: int) -> np.ndarray:
        num_blocks = -(-self._sequences.shape[1] // self._slot.kv.block_size)
        return 1 + np.arange(num_sequences * num_blocks, dtype=np.int32).reshape(num_sequences, num_blocks)

    def _run(self, rows: StepRows, levels: Levels) -> float:
        slot = self._slot
        started_s = time.perf_counter()
        if slot.graphs is not None:
            slot.graphs.launch(rows, levels).token_ids()
        else:
            batch = to_device(rows, slot.kv.block_size, levels, slot.device)
            slot.model.forward(batch, slot.kv).logits.argmax(dim=-1).tolist()
        return time.perf_counter() - started_s


def undisturbed_s(times_s: Sequence[float]) -> float:
    """Mean of the fastest quarter, of one at least."""
    fastest = sorted(times_s)[: max(1, len(times_s) // 4)]
    return sum(fastest) / len(fastest)
