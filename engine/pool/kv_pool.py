"""Sizes a model's KV pool from what its device has left: measures what engine.memory calculates with."""

from __future__ import annotations

import logging

import numpy as np
import torch

from engine.batch import ForwardBatch, StepRows, to_device
from engine.config import ConfigError, EngineConfig
from engine.kv_cache.storage import KvStorage
from engine.memory import GIB, MemoryPlan, MemoryUse, check_weights_fit, plan_memory
from engine.models.decoder import Decoder
from engine.models.spec import ModelSpec
from engine.sampling.choose import sample
from engine.sampling.state import SamplingState
from engine.scheduler.scheduler import MAX_PROMPT_LOGITS
from engine.types import Levels, SamplingParams

logger = logging.getLogger(__name__)

CPU_KV_BYTES = 2 << 30  # a replica on the CPU shares its memory with everything else
DRIVER_BYTES = 512 << 20  # what the driver keeps of some hundred graphs


def check_weights(weights_bytes: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ConfigError if the weights alone are too large for a GPU."""
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        check_weights_fit(weights_bytes, free_bytes, str(dtype).removeprefix("torch."), torch.cuda.get_device_name())


def size_kv_pool(
    config: EngineConfig, spec: ModelSpec, model: Decoder, weights_bytes: int, dtype: torch.dtype, device: torch.device
) -> MemoryPlan:
    """Plan and log the memory of a loaded model; on a GPU runs the largest step once. Raises ConfigError."""
    block_bytes = KvStorage.block_bytes(spec, config.cache.block_size, dtype)
    use = MemoryUse(max(CPU_KV_BYTES, (config.cache.num_blocks or 0) * block_bytes), weights_bytes)
    if device.type == "cuda":
        activations_bytes = _measure_activations(config, spec, model, dtype, device)
        free_bytes, _ = torch.cuda.mem_get_info(device)
        graphs_bytes = _graphs_bytes(config, spec, activations_bytes, dtype) if config.cuda_graphs else 0
        use = MemoryUse(free_bytes, weights_bytes, activations_bytes, graphs_bytes)
    plan = plan_memory(config, use, block_bytes, spec.max_position)
    logger.info("%s", plan.describe())
    return plan


def log_graphs(plan: MemoryPlan, device: torch.device) -> None:
    """Tell what of the memory set aside for them the captured graphs took. Call after capture, the pool in place."""
    free_bytes, _ = torch.cuda.mem_get_info(device)
    taken_bytes = plan.use.free_bytes - plan.num_blocks * plan.block_bytes - free_bytes
    logger.info(
        "memory: graphs took %.2f GiB of %.2f GiB set aside; %.2f GiB are free for activations",
        taken_bytes / GIB, plan.use.graphs_bytes / GIB, free_bytes / GIB,
    )  # fmt: skip


def _graphs_bytes(config: EngineConfig, spec: ModelSpec, activations_bytes: int, dtype: torch.dtype) -> int:
    """Graphs share one pool as large as the largest captured step, and a few arrays at fixed addresses."""
    from engine.graphs import ROW_SIZES

    max_rows, max_num_seqs = config.scheduler.max_num_batched_tokens, config.scheduler.max_num_seqs
    pool_bytes = int(activations_bytes * min(1.0, ROW_SIZES[-1] / max_rows))
    num_fixed = max_rows * (2 * spec.q_size + spec.hidden_size) + max_num_seqs * spec.vocab_size
    return pool_bytes + num_fixed * dtype.itemsize + DRIVER_BYTES


def _measure_activations(
    config: EngineConfig, spec: ModelSpec, model: Decoder, dtype: torch.dtype, device: torch.device
) -> int:
    """Bytes by which the largest step exceeds what lies on the GPU anyway."""
    max_tokens = config.scheduler.max_num_batched_tokens
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before_bytes = torch.cuda.memory_allocated(device)
    try:
        run_largest_step(config, spec, model, dtype, device)
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise ConfigError(
            f"scheduler.max_num_batched_tokens is {max_tokens}, and a step of that size does not fit beside the "
            f"weights; allowed: fewer tokens, or a device with more memory ({str(error).partition('.')[0]})"
        ) from error
    peak_bytes = torch.cuda.max_memory_allocated(device) - before_bytes
    torch.cuda.empty_cache()
    return peak_bytes


@torch.inference_mode()
def run_largest_step(
    config: EngineConfig, spec: ModelSpec, model: Decoder, dtype: torch.dtype, device: torch.device
) -> None:
    """As many prompt tokens as a step may have, at the end of contexts as long as may be, and sampling from all."""
    kv = KvStorage(spec, 2, config.cache.block_size, dtype, device)
    batch = _largest_batch(config, spec, device)
    logits = model.forward(batch, kv).logits
    params = SamplingParams(temperature=1.0, top_p=0.9, logprobs=0)
    num_seqs = min(config.scheduler.max_num_seqs, len(logits))
    states = [SamplingState(params, (), spec.vocab_size, frozenset(), seed) for seed in range(num_seqs)]
    sample(logits[:num_seqs].float(), states)


def _largest_batch(config: EngineConfig, spec: ModelSpec, device: torch.device) -> ForwardBatch:
    """Logits are wanted of as many rows as a step may have, for log-probabilities of prompts. One scratch block."""
    max_model_len = min(config.model.max_model_len or spec.max_position, spec.max_position)
    max_tokens, block_size = config.scheduler.max_num_batched_tokens, config.cache.block_size
    num_sequences = -(-max_tokens // max_model_len)
    counts = np.full(num_sequences, max_model_len)
    counts[-1] = max_tokens - max_model_len * (num_sequences - 1)
    flags = np.ones(num_sequences, dtype=bool)
    max_logits = MAX_PROMPT_LOGITS + config.scheduler.max_num_seqs
    rows = StepRows(
        num_decodes=0,
        places=np.arange(num_sequences),
        starts=max_model_len - counts,
        counts=counts,
        samples=flags,
        num_logits=np.clip(max_logits - (np.cumsum(counts) - counts), 1, counts),
        exact=~flags,
        tables=np.ones((num_sequences, -(-max_model_len // block_size)), dtype=np.int32),
        token_ids=np.arange(max_tokens) % spec.vocab_size,
    )
    return to_device(rows, block_size, Levels(), device)
