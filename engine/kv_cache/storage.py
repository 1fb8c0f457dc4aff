"""The memory behind the blocks: keys and values of every layer, addressed by slot = block * block_size + offset."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.models.spec import ModelSpec


class KvStorage:
    """keys and values, each [L, num_blocks, block_size, num_kv_heads, head_dim]. Block 0 is scratch for padding."""

    def __init__(
        self, spec: ModelSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (spec.num_layers, num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys, values [T, num_kv_heads, head_dim] of one layer at slots [T]."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, keys)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, values)

    @staticmethod
    def block_bytes(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
        """Bytes that one block takes over all layers."""
        return 2 * spec.num_layers * block_size * spec.kv_size * dtype.itemsize
