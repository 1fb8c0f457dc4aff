"""The attention interface: one implementation per file, chosen by select.py."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from engine.batch import AttentionMetadata


class AttentionBackend(Protocol):
    """Causal attention of a step's rows over the paged KV of one layer."""

    name: str

    def forward(
        self,
        queries: Tensor,  # [T, num_heads, head_dim]
        keys: Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim], this step's rows already written
        values: Tensor,  # like keys
        metadata: AttentionMetadata,
    ) -> Tensor:  # [T, num_heads, head_dim]
        ...
