"""One forward pass over the calibration text, layer by layer: what reaches each MoE layer, one layer in memory.

Legend: S sequences, T tokens each, N = S T, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from engine.batch import ForwardBatch, StepRows, to_device
from engine.config import BrownoutConfig, CacheConfig, EngineConfig, ModelConfig
from engine.moe.layer import MoeLayer
from engine.pool.slots import ModelSlot, load_slot
from engine.types import Levels
from engine.unite.pairs import LayerTrace

BATCH_TOKENS = 8192  # computed at once; also bounds the KV cache, which holds one batch


def load_for_calibration(model: ModelConfig, num_tokens: int, device: str = "auto") -> ModelSlot:
    """The model without united experts, with KV blocks for one batch of sequences of ``num_tokens``."""
    cache = CacheConfig()
    blocks = _sequences_per_batch(num_tokens) * -(-num_tokens // cache.block_size) + 1
    return load_slot(
        EngineConfig(
            model,
            CacheConfig(num_blocks=blocks, prefix_caching=False),
            brownout=BrownoutConfig(),
            device=device,
            kernels="torch",
            cuda_graphs=False,
        )
    )


class _Recorder:
    """Stands in for a MoE layer and keeps its inputs."""

    def __init__(self, moe: MoeLayer) -> None:
        self.moe = moe
        self.inputs: list[Tensor] = []

    def __call__(self, x: Tensor, *args: Any) -> Tensor:
        self.inputs.append(x.clone())
        return self.moe(x, *args)


@torch.no_grad()
def trace_layers(slot: ModelSlot, sequences: Tensor) -> Iterator[tuple[int, LayerTrace]]:
    """(layer, trace) of every MoE layer in order; the tokens of a sequence [S, T] are successive rows of a trace.

    Between layers only the hidden states of all tokens are kept: about three tensors [N, D].
    """
    model, kv = slot.model, slot.kv
    batches = list(_batches(slot, sequences))
    states = []
    for batch in batches:
        hidden, queries = model.begin(batch, kv)
        states.append((hidden, model.attend(0, queries, batch, kv)))
    for index, layer in enumerate(model.layers):
        original = layer.feed_forward
        recorder = _Recorder(original) if isinstance(original, MoeLayer) else None
        layer.feed_forward = cast(MoeLayer, recorder or original)
        try:
            for number, batch in enumerate(batches):
                hidden, queries = model.advance(index, *states[number], batch, kv)
                # The next layer's attention comes at once: the batches share the blocks that hold its keys.
                following = queries if index + 1 == len(model.layers) else model.attend(index + 1, queries, batch, kv)
                states[number] = (hidden, following)
        finally:
            layer.feed_forward = original
        if recorder is not None:
            yield index, _trace(recorder)


def _trace(recorder: _Recorder) -> LayerTrace:
    routings = [recorder.moe.gate(x) for x in recorder.inputs]
    experts = recorder.moe.experts
    originals = slice(0, experts.num_originals)
    return LayerTrace(
        experts.gate_up[originals],
        experts.down[originals],
        torch.cat(recorder.inputs),
        torch.cat([routing.ids for routing in routings]),
        torch.cat([routing.weights for routing in routings]),
    )


def _batches(slot: ModelSlot, sequences: Tensor) -> Iterator[ForwardBatch]:
    """Prefill batches of whole sequences; all use the same KV blocks."""
    num_tokens, block_size = sequences.shape[1], slot.kv.block_size
    num_blocks = -(-num_tokens // block_size)
    for part in sequences.split(_sequences_per_batch(num_tokens)):
        tables = 1 + np.arange(len(part) * num_blocks, dtype=np.int32).reshape(len(part), num_blocks)
        rows = StepRows.prompts(part.numpy(), tables, samples=False)
        yield to_device(rows, block_size, Levels(), slot.device)


def _sequences_per_batch(num_tokens: int) -> int:
    return max(1, BATCH_TOKENS // num_tokens)
