"""How a device's memory is shared between weights, activations, CUDA graphs and the KV pool: the arithmetic.

Measured bytes come in, the number of KV blocks comes out, or one sentence that says what would fit. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import ConfigError, EngineConfig

GIB = 1 << 30
MIN_BLOCKS = 2  # one is scratch for padding


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """What a device holds beside KV. All in bytes."""

    free_bytes: int  # once the weights lie there
    weights_bytes: int
    activations_bytes: int = 0  # at the peak of the largest step that may be scheduled
    graphs_bytes: int = 0  # set aside for CUDA graphs, which are captured last

    @property
    def left_bytes(self) -> int:
        return self.free_bytes - self.activations_bytes - self.graphs_bytes


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What the KV pool gets, and what that serves."""

    use: MemoryUse
    num_blocks: int
    block_size: int  # tokens
    block_bytes: int
    max_model_len: int  # tokens; as configured, or what the pool holds

    @property
    def num_tokens(self) -> int:
        return (self.num_blocks - 1) * self.block_size

    def describe(self) -> str:
        """One line for the log at start."""
        use = self.use
        measured = ""
        if use.activations_bytes:
            measured = f"activations {_gib(use.activations_bytes)}, graphs {_gib(use.graphs_bytes)} set aside, "
        return (
            f"memory: weights {_gib(use.weights_bytes)}, {measured}"
            f"KV {_gib(self.num_blocks * self.block_bytes)} in {self.num_blocks} blocks: {self.num_tokens} tokens, "
            f"or {self.num_tokens / self.max_model_len:.1f} sequences of {self.max_model_len}"
        )


def check_weights_fit(weights_bytes: int, free_bytes: int, dtype: str, device: str) -> None:
    """Raises ConfigError before anything is loaded."""
    if weights_bytes >= free_bytes:
        raise ConfigError(
            f"model.path names a model whose weights take {_gib(weights_bytes)} in {dtype}, and {device} has "
            f"{_gib(free_bytes)} free; allowed: a smaller model, or a device with more memory"
        )


def plan_memory(config: EngineConfig, use: MemoryUse, block_bytes: int, max_position: int) -> MemoryPlan:
    """As many KV blocks as a full batch of the longest sequences needs, as far as memory allows.

    cache.num_blocks, if given, is taken as it is. ``max_position``: the longest context that the model knows, tokens. A
    model.max_model_len that was asked for by name must fit; the model's own is cut to what the pool holds. Raises
    ConfigError with one sentence that says what would fit.
    """
    cache = config.cache
    max_model_len = min(config.model.max_model_len or max_position, max_position)
    budget_bytes = int(max(0, use.left_bytes) * cache.memory_frac)
    if cache.num_blocks is None:
        longest_blocks = -(-max_model_len // cache.block_size)
        num_blocks = min(config.scheduler.max_num_seqs * longest_blocks + 1, budget_bytes // block_bytes)
        _require_room(config, use, num_blocks, longest_blocks, block_bytes)
    else:
        num_blocks = cache.num_blocks
        if num_blocks * block_bytes > use.left_bytes:
            raise ConfigError(
                f"cache.num_blocks is {num_blocks}, which takes {_gib(num_blocks * block_bytes)}; "
                f"{_gib(max(0, use.left_bytes))} are free; allowed: at most {max(0, use.left_bytes) // block_bytes}"
            )
    fits = (num_blocks - 1) * cache.block_size
    return MemoryPlan(use, num_blocks, cache.block_size, block_bytes, min(max_model_len, fits))


def _require_room(config: EngineConfig, use: MemoryUse, num_blocks: int, longest_blocks: int, block_bytes: int) -> None:
    """The pool holds at least one block, and at least one sequence as long as asked for."""
    cache, asked_len = config.cache, config.model.max_model_len
    if num_blocks < MIN_BLOCKS:
        lacking_bytes = _lacking(use, cache.memory_frac, MIN_BLOCKS * block_bytes)
        raise ConfigError(
            f"cache.memory_frac is {cache.memory_frac}, and of {_gib(use.free_bytes)} beside the weights activations "
            f"take {_gib(use.activations_bytes)} and graphs {_gib(use.graphs_bytes)}: the rest holds no KV "
            f"block; allowed: a smaller model, {_gib(lacking_bytes)} more memory, "
            f"or a lower scheduler.max_num_batched_tokens (now {config.scheduler.max_num_batched_tokens})"
        )
    if asked_len is not None and num_blocks - 1 < longest_blocks:
        wanted_bytes = (longest_blocks + 1) * block_bytes
        lacking_bytes = _lacking(use, cache.memory_frac, wanted_bytes)
        raise ConfigError(
            f"model.max_model_len is {asked_len}, whose KV takes {_gib(wanted_bytes)}; allowed: at most "
            f"{(num_blocks - 1) * cache.block_size}, {_gib(lacking_bytes)} more memory, "
            f"or a lower scheduler.max_num_batched_tokens (now {config.scheduler.max_num_batched_tokens}, whose "
            f"activations take {_gib(use.activations_bytes)})"
        )


def _lacking(use: MemoryUse, memory_frac: float, kv_bytes: int) -> int:
    """Memory that the device would need besides its own for this much KV."""
    return max(0, int(kv_bytes / memory_frac) - use.left_bytes)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
