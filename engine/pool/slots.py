"""Residency: everything that one model owns on a device sits in one slot, and nobody else keeps a reference.

The engine can leave a slot and take it up again between two steps; switching models at token level builds on that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.attention.select import create_attention
from engine.config import ConfigError, EngineConfig
from engine.kv_cache.storage import KvStorage
from engine.models.decoder import Decoder
from engine.models.kernels import create_kernels
from engine.models.registry import load_spec
from engine.models.spec import ModelSpec
from engine.moe.dimming import Dimming, create_dimming
from engine.moe.ladder import Ladder
from engine.moe.load import ExpertCounter
from engine.pool.kv_pool import check_weights, log_graphs, size_kv_pool
from engine.weights.load import load_weights, open_source, weights_bytes

if TYPE_CHECKING:
    from engine.graphs import StepGraphs


@dataclass(slots=True, weakref_slot=True)
class ModelSlot:
    """One model on one device: weights, KV pool, dimming tables, CUDA graphs."""

    spec: ModelSpec
    dimming: Dimming
    model: Decoder
    kv: KvStorage
    graphs: StepGraphs | None
    counter: ExpertCounter | None
    max_model_len: int
    device: torch.device

    @property
    def ladder(self) -> Ladder:
        return self.dimming.ladder


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch sees no GPU; allowed here: auto, cpu")
    return torch.device(name)


def load_slot(config: EngineConfig, any_dimmer: bool = False) -> ModelSlot:
    """Load a model. Raises ConfigError or CheckpointError, in one sentence.

    ``any_dimmer``: other settings than the ladder's will be tried, so that captured kernels need the code for all.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)  # of the calling thread, which is the one that runs the model
    directory = Path(config.model.path)
    device = resolve_device(config.device)
    spec = load_spec(directory)
    dimming = create_dimming(config, spec, device)
    dtype = _resolve_dtype(config.model.dtype, spec, device)
    source = open_source(config.model, spec, device)
    block_size = config.cache.block_size
    attention = create_attention(config.attention, device, spec.head_dim, dtype, block_size)
    kernels = create_kernels(config.kernels, spec, device)
    num_united = {layer: dimming.num_united for layer, dimmer in enumerate(dimming.dimmers) if dimmer is not None}
    num_weights_bytes = weights_bytes(spec, dtype, num_united)
    check_weights(num_weights_bytes, dtype, device)
    weights = load_weights(spec, source, num_united, dtype, device)
    model = Decoder(spec, weights, dimming.dimmers, attention, kernels)
    del weights
    dimming.load_united(model.experts)
    plan = size_kv_pool(config, spec, model, num_weights_bytes, dtype, device)
    kv = KvStorage(spec, plan.num_blocks, block_size, dtype, device)
    max_model_len = plan.max_model_len
    counter = _count_experts(model, device) if spec.moe_layers else None
    graphs = None
    if config.cuda_graphs and kernels.name == "triton":
        from engine.graphs import StepGraphs

        if dimming.num_dimmed_layers:
            dimming.dimmer.compile_for(any_dimmer)
        scheduler, graphable = config.scheduler, attention.decode_backend.graphable
        max_rows = scheduler.max_num_batched_tokens
        graphs = StepGraphs(model, kv, max_model_len, scheduler.max_num_seqs, max_rows, graphable, device)
        log_graphs(plan, device)
    return ModelSlot(spec, dimming, model, kv, graphs, counter, max_model_len, device)


def _count_experts(model: Decoder, device: torch.device) -> ExpertCounter:
    """A counter that every layer with routed experts reports to."""
    counter = ExpertCounter({layer: len(experts.gate_up) for layer, experts in model.experts.items()}, device)
    for layer in model.experts:
        model.layers[layer].moe.counter = counter
    return counter


def _resolve_dtype(name: str, spec: ModelSpec, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "float32" if device.type == "cpu" else spec.dtype
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"model.dtype is {name!r}; allowed: float32, bfloat16, float16")
    return dtype
