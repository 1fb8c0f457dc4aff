"""What a setting costs in quality: loss against level 0 on held-out text, in steps as they are served.

Legend: S sequences, T tokens each, B rows of a step, G steps, A experts per token, V vocabulary size.

A decode step has one token of each of B different sequences; all positions are dimmed, so the context is too. Only the
dimmer sees which tokens share a step. So the text goes through the model in one pass, as prompts, while every layer's
dimmer is applied step by step: B sequences x T positions are T steps. A prefill step has whole sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from engine.batch import RowInfo, StepRows, to_device
from engine.calibrate.candidates import StepSize
from engine.config import ConfigError
from engine.moe.dimmer import Dimmed, Dimmer
from engine.moe.gate import Routing
from engine.moe.layer import MoeLayer
from engine.moe.settings import DimSetting
from engine.pool.slots import ModelSlot
from engine.types import Levels, Phase

LOGIT_ROWS = 2048  # computed at once
PASS_TOKENS = 16384  # of the text in one pass, unless a step needs more


@dataclass(frozen=True, slots=True)
class Quality:
    """Against level 0, per predicted token."""

    loss: float  # nats more than level 0
    se: float  # standard error of the loss, over sequences
    kl: float  # nats, from level 0's distribution to the dimmed one
    experts: float  # distinct experts that a step reads in a dimmed layer, mean
    exact_experts: float  # the same at level 0


class QualityMeter:
    """Compares settings with level 0 on ``sequences`` [S, T]. The slot runs the plain torch kernels.

    Holds level 0's logits [S (T - 1), V] in the model's dtype, on the slot's device.
    """

    def __init__(self, slot: ModelSlot, sequences: Tensor) -> None:
        self.slot = slot
        self._sequences = sequences
        self._layers = [
            layer.feed_forward
            for layer in slot.model.layers
            if isinstance(layer.feed_forward, MoeLayer) and layer.feed_forward.dimmer is not None
        ]
        dimmer = self._layers[0].dimmer
        assert dimmer is not None
        self._dimmer = dimmer
        self.layers = tuple(layer.index for layer in self._layers)
        self._exact: list[Tensor] | None = None

    def measure(self, setting: DimSetting, size: StepSize) -> Quality:
        """Raises ConfigError if the text has too few sequences for a step of this size."""
        num_sequences, num_tokens = self._sequences.shape
        rows_per_pass = self._sequences_per_pass(size)
        self._dimmer.set_settings([DimSetting(), setting])
        losses, kl_sum = [], 0.0
        steps = _Steps(size, num_tokens)
        with self._stepwise(steps):
            for first in range(0, num_sequences - rows_per_pass + 1, rows_per_pass):
                part = self._sequences[first : first + rows_per_pass]
                difference, kl = self._compare(part, self._exact_logits(rows_per_pass)[first // rows_per_pass], size)
                losses.append(difference.mean(dim=1))
                kl_sum += float(kl.mean()) * len(part)
        loss = torch.cat(losses)
        return Quality(
            loss=float(loss.mean()),
            se=float(loss.std() / len(loss) ** 0.5),
            kl=kl_sum / len(loss),
            experts=steps.mean_experts,
            exact_experts=steps.mean_exact_experts,
        )

    def _sequences_per_pass(self, size: StepSize) -> int:
        """A whole number of steps."""
        num_sequences, num_tokens = self._sequences.shape
        per_step = size.num_tokens if size.phase is Phase.DECODE else -(-size.num_tokens // num_tokens)
        if per_step > num_sequences:
            raise ConfigError(
                f"a {size.name} step takes {per_step} sequences of {num_tokens} tokens, and the text gives "
                f"{num_sequences}; allowed: more text, or smaller steps"
            )
        return min(num_sequences // per_step, max(1, PASS_TOKENS // (per_step * num_tokens))) * per_step

    def _exact_logits(self, rows_per_pass: int) -> list[Tensor]:
        """Level 0's logits of each pass: [rows_per_pass (T - 1), V]."""
        if self._exact is None or len(self._exact[0]) != rows_per_pass * (self._sequences.shape[1] - 1):
            self._exact = None
            self._exact = [
                torch.cat(list(self._logits(part, Levels())))
                for part in self._sequences.split(rows_per_pass)
                if len(part) == rows_per_pass
            ]
        return self._exact

    @torch.inference_mode()
    def _compare(self, part: Tensor, exact: Tensor, size: StepSize) -> tuple[Tensor, Tensor]:
        """Loss more than level 0's and KL, [sequences, T - 1] each."""
        levels = Levels(prefill=int(size.phase is Phase.PREFILL), decode=int(size.phase is Phase.DECODE))
        following = part[:, 1:].flatten().to(exact.device)
        differences, kls = [], []
        first = 0
        for logits in self._logits(part, levels):
            rows = slice(first, first + len(logits))
            dimmed, plain = logits.float().log_softmax(-1), exact[rows].float().log_softmax(-1)
            differences.append((plain - dimmed).gather(1, following[rows, None])[:, 0])
            kls.append((plain.exp() * (plain - dimmed)).sum(-1))
            first = rows.stop
        shape = (len(part), -1)
        return torch.cat(differences).view(shape), torch.cat(kls).view(shape)

    @torch.inference_mode()
    def _logits(self, part: Tensor, levels: Levels) -> Iterator[Tensor]:
        """[<= LOGIT_ROWS, V] each, of all positions of all sequences but their last."""
        slot, num_tokens = self.slot, part.shape[1]
        num_blocks = -(-num_tokens // slot.kv.block_size)
        tables = 1 + np.arange(len(part) * num_blocks, dtype=np.int32).reshape(len(part), num_blocks)
        rows = StepRows.prompts(part.numpy(), tables, samples=False)
        batch = to_device(rows, slot.kv.block_size, levels, slot.device)
        if levels.decode:
            batch = replace(batch, rows=replace(batch.rows, phase=torch.full_like(batch.rows.phase, int(Phase.DECODE))))
        hidden, queries = slot.model.begin(batch, slot.kv)
        for index in range(len(slot.model.layers)):
            attended = slot.model.attend(index, queries, batch, slot.kv)
            hidden, queries = slot.model.advance(index, hidden, attended, batch, slot.kv)
        wanted = hidden.normed.view(len(part), num_tokens, -1)[:, :-1].flatten(0, 1)
        for normed in wanted.split(LOGIT_ROWS):
            yield slot.model.logits(normed)

    @contextmanager
    def _stepwise(self, steps: _Steps) -> Iterator[None]:
        for layer in self._layers:
            layer.dimmer = cast(Dimmer, _StepwiseDimmer(self._dimmer, steps))
        try:
            yield
        finally:
            for layer in self._layers:
                layer.dimmer = self._dimmer


@dataclass(slots=True)
class _Steps:
    """How the rows of a pass, sequence by sequence, form steps; and how many experts the steps have read."""

    size: StepSize
    num_tokens: int  # of a sequence
    num_experts: float = 0.0
    num_exact_experts: float = 0.0
    num_counted: int = 0

    def split(self, of_rows: Tensor) -> Tensor:
        """[S T, ...] -> [G, B, ...]"""
        if self.size.phase is Phase.PREFILL:
            per_step = -(-self.size.num_tokens // self.num_tokens) * self.num_tokens
            return of_rows.view(-1, per_step, *of_rows.shape[1:])
        grouped = of_rows.view(-1, self.size.num_tokens, self.num_tokens, *of_rows.shape[1:])  # [S / B, B, T, ...]
        return grouped.transpose(1, 2).flatten(0, 1)

    def join(self, of_steps: Tensor) -> Tensor:
        """[G, B, ...] -> [S T, ...]"""
        if self.size.phase is Phase.PREFILL:
            return of_steps.flatten(0, 1)
        return of_steps.view(-1, self.num_tokens, *of_steps.shape[1:]).transpose(1, 2).flatten(0, 2)

    def count(self, exact_ids: Tensor, ids: Tensor, num_packed: int) -> None:
        """Ids [G, B, A] before and after."""
        self.num_exact_experts += _distinct(exact_ids, num_packed)
        self.num_experts += _distinct(ids, num_packed)
        self.num_counted += len(ids)

    @property
    def mean_experts(self) -> float:
        return self.num_experts / max(1, self.num_counted)

    @property
    def mean_exact_experts(self) -> float:
        return self.num_exact_experts / max(1, self.num_counted)


class _StepwiseDimmer:
    """Applies a dimmer to the rows of each step by themselves."""

    def __init__(self, dimmer: Dimmer, steps: _Steps) -> None:
        self._dimmer, self._steps = dimmer, steps

    def rewrite(self, layer: int, routing: Routing, rows: RowInfo) -> Dimmed:
        assert routing.probs is not None
        steps = self._steps
        ids, weights, probs = (steps.split(part) for part in (routing.ids, routing.weights, routing.probs))
        step_rows = replace(
            rows,
            phase=rows.phase[: ids.shape[1]],
            exact=rows.exact[: ids.shape[1]],
            valid=rows.valid[: ids.shape[1]],
        )

        def rewrite_step(ids: Tensor, weights: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            dimmed = self._dimmer.rewrite(layer, Routing(ids, weights, probs), step_rows)
            return dimmed.routing.ids, dimmed.routing.weights, dimmed.dimmed_pairs

        new_ids, new_weights, dimmed_pairs = torch.vmap(rewrite_step)(ids, weights, probs)
        steps.count(ids, new_ids, self._dimmer.num_packed)
        return Dimmed(Routing(steps.join(new_ids), steps.join(new_weights)), steps.join(dimmed_pairs))


def _distinct(ids: Tensor, num_packed: int) -> float:
    """Summed over steps: experts among ids [G, B, A]; ``num_packed`` is none."""
    used = torch.zeros(len(ids), num_packed + 1, device=ids.device).scatter_(1, ids.flatten(1), 1.0)
    return float(used[:, :num_packed].sum())
