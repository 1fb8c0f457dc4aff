"""FlashAttention-3 (Shah et al. 2024), Hopper only: paged decode and paged varlen prefill, any page size."""

from __future__ import annotations

from torch import Tensor

from engine.attention.base import DecodeBackend
from engine.batch import AttentionMetadata


class FlashAttention3(DecodeBackend):
    name = "flash_attn3"
    graphable = True

    def decode(self, queries: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata) -> Tensor:
        from flash_attn_interface import flash_attn_with_kvcache

        n = metadata.num_decodes
        return flash_attn_with_kvcache(
            queries.unsqueeze(1), keys, values, causal=True,
            cache_seqlens=metadata.context_lens_dev[:n], page_table=metadata.block_table[:n],
        ).squeeze(1)  # fmt: skip

    def prefill(self, queries: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata) -> Tensor:
        from flash_attn_interface import flash_attn_with_kvcache

        n = metadata.num_decodes
        return flash_attn_with_kvcache(
            queries, keys, values, causal=True,
            cache_seqlens=metadata.context_lens_dev[n:], page_table=metadata.block_table[n:],
            cu_seqlens_q=metadata.prefill_starts_dev, max_seqlen_q=max(metadata.query_lens[n:]),
        )  # fmt: skip
