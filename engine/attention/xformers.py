"""xformers' split-K decode over paged KV (pages a multiple of 64 tokens); its prefill has no paged form."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.attention.base import DecodeBackend
from engine.batch import AttentionMetadata

PAGE_MULTIPLE = 64


class XformersDecode(DecodeBackend):
    name = "xformers"
    graphable = True

    def decode(self, queries: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata) -> Tensor:
        from xformers.ops.fmha import memory_efficient_attention_forward, triton_splitk
        from xformers.ops.fmha.attn_bias import PagedBlockDiagonalPaddedKeysMask, _PaddedSeqLenInfo, _SeqLenInfo

        num_blocks, block_size, num_kv_heads, head_dim = keys.shape
        n, group = len(queries), queries.shape[1] // num_kv_heads
        table = metadata.block_table[:n]
        padding = table.shape[1] * block_size
        starts = torch.arange(n + 1, dtype=torch.int32, device=queries.device)
        # Built from the device's own lengths: the library's constructor wants them on the host.
        bias = PagedBlockDiagonalPaddedKeysMask(
            q_seqinfo=_SeqLenInfo(starts, 1, 1, list(range(n + 1))),
            k_seqinfo=_PaddedSeqLenInfo(
                seqstart=starts * padding, seqstart_py=list(range(0, (n + 1) * padding, padding)),
                seqlen=metadata.context_lens_dev[:n], seqlen_py=[padding] * n,
                min_seqlen=1, max_seqlen=padding, padding=padding,
            ),
            block_tables=table,
            page_size=block_size,
        )  # fmt: skip
        paged = (1, num_blocks * block_size, num_kv_heads, group, head_dim)
        out = memory_efficient_attention_forward(
            queries.unflatten(1, (num_kv_heads, group)).unsqueeze(0),
            keys.reshape(1, -1, num_kv_heads, 1, head_dim).expand(paged),
            values.reshape(1, -1, num_kv_heads, 1, head_dim).expand(paged),
            bias,
            op=triton_splitk.FwOp,
        )
        return out.reshape(queries.shape)
