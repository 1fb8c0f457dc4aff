"""flash-attn 2 (Dao 2023): paged decode and paged varlen prefill; pages must be multiples of 256 tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.attention.base import DecodeBackend
from engine.batch import AttentionMetadata

PAGE_MULTIPLE = 256


class FlashAttention(DecodeBackend):
    name = "flash_attn"
    graphable = True

    def decode(self, queries: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata) -> Tensor:
        from flash_attn import flash_attn_with_kvcache

        n = metadata.num_decodes
        return flash_attn_with_kvcache(
            queries.unsqueeze(1), keys, values, causal=True,
            cache_seqlens=metadata.context_lens_dev[:n], block_table=metadata.block_table[:n],
        ).squeeze(1)  # fmt: skip

    def prefill(self, queries: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata) -> Tensor:
        from flash_attn import flash_attn_varlen_func

        n = metadata.num_decodes
        context_starts = torch.zeros_like(metadata.prefill_starts_dev)
        torch.cumsum(metadata.context_lens_dev[n:], dim=0, dtype=torch.int32, out=context_starts[1:])
        return flash_attn_varlen_func(
            queries, keys, values, metadata.prefill_starts_dev, context_starts,
            max(metadata.query_lens[n:]), max(metadata.context_lens[n:]),
            causal=True, block_table=metadata.block_table[n:],
        )  # fmt: skip
