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

    def begin_step(self) -> None:
        """Called before the first layer's ``decode``: what one layer works out the others of the step may keep."""
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

    def begin_step(self) -> None:
        """Before the first layer of a step."""
        self.decode_backend.begin_step()

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
