"""The attention interface: what a step's rows need, split by phase. One backend per file, chosen by select.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.batch import AttentionMetadata


class DecodeBackend(Protocol):
    """Attention of the first ``metadata.num_decodes`` sequences, one row each, over the paged KV of one layer."""

    name: str
    graphable: bool  # reads lengths from the device only, so that a CUDA graph can hold it

    def begin_step(self, metadata: AttentionMetadata, num_kv_heads: int) -> None:
        """Prepares what the layers of a step with decode rows share."""
        return

    def decode(
        self,
        queries: Tensor,  # [num_decodes, num_heads, head_dim]
        keys: Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim], this step's rows already written
        values: Tensor,  # like keys
        metadata: AttentionMetadata,
    ) -> Tensor:  # like queries
        ...


class PrefillBackend(Protocol):
    """Causal attention of the other sequences' rows, each a chunk that may follow earlier computed tokens."""

    name: str

    def prefill(self, queries: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention of all rows of a step, decode rows first."""

    decode_backend: DecodeBackend
    prefill_backend: PrefillBackend

    def begin_step(self, metadata: AttentionMetadata, num_kv_heads: int) -> None:
        """Called before anything else of a step."""
        if metadata.num_decodes:
            self.decode_backend.begin_step(metadata, num_kv_heads)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata) -> Tensor:
        """[T, num_heads, head_dim] -> [T, num_heads, head_dim]"""
        n = metadata.num_decodes
        if n == len(queries):
            return self.decode_backend.decode(queries, keys, values, metadata)
        if n == 0:
            return self.prefill_backend.prefill(queries, keys, values, metadata)
        return torch.cat(
            (
                self.decode_backend.decode(queries[:n], keys, values, metadata),
                self.prefill_backend.prefill(queries[n:], keys, values, metadata),
            )
        )
