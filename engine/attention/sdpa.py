"""Attention by torch's scaled_dot_product_attention over gathered pages: runs anywhere, reference for the others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.base import DecodeBackend
from engine.batch import AttentionMetadata


class SdpaAttention(DecodeBackend):
    name = "sdpa"
    graphable = False

    def prefill(self, queries: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata) -> Tensor:
        out = torch.empty_like(queries)
        row = 0
        for sequence in range(metadata.num_decodes, len(metadata.query_lens)):
            end = row + metadata.query_lens[sequence]
            out[row:end] = self._prefill(queries[row:end], keys, values, metadata, sequence)
            row = end
        return out

    def decode(self, queries: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata) -> Tensor:
        """All decode rows at once, padded to the longest context."""
        n, block_size = metadata.num_decodes, keys.shape[1]
        num_blocks = -(-max(metadata.context_lens[:n]) // block_size)
        table = metadata.block_table[:n, :num_blocks]
        k, v = _gather(keys, table), _gather(values, table)  # [n, num_kv_heads, S, head_dim]
        positions = torch.arange(k.shape[2], device=k.device)
        mask = positions < metadata.context_lens_dev[:n, None]  # [n, S]
        out = F.scaled_dot_product_attention(
            queries.unsqueeze(2), k, v, attn_mask=mask[:, None, None, :], enable_gqa=True
        )
        return out.squeeze(2)

    @staticmethod
    def _prefill(queries: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, sequence: int) -> Tensor:
        """One chunk, which may follow cached or earlier computed tokens of its sequence."""
        context_len = metadata.context_lens[sequence]
        num_rows, block_size = queries.shape[0], keys.shape[1]
        table = metadata.block_table[sequence : sequence + 1, : -(-context_len // block_size)]
        k, v = (_gather(cache, table)[:, :, :context_len] for cache in (keys, values))  # [1, num_kv_heads, S, head_dim]
        key_positions = torch.arange(context_len, device=k.device)
        query_positions = key_positions[context_len - num_rows :]
        mask = key_positions <= query_positions[:, None]  # [rows, S]
        out = F.scaled_dot_product_attention(queries.transpose(0, 1)[None], k, v, attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)


def _gather(cache: Tensor, table: Tensor) -> Tensor:
    """[num_blocks, block_size, num_kv_heads, head_dim] by [n, m] -> [n, num_kv_heads, m block_size, head_dim]

    index_select copies whole blocks; cache[table] would go number by number on the CPU.
    """
    pages = cache.index_select(0, table.flatten())
    return pages.view(len(table), -1, *cache.shape[2:]).transpose(1, 2)
