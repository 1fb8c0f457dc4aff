"""Triton twin of the norm of query and key heads.

Letters: see engine/types.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.layers.norm import HeadNorm

HEADS_PER_PROGRAM = 8


class FusedHeadNorm(HeadNorm):
    """HeadNorm in one launch, in place, float32 inside."""

    def __call__(self, qkv: Tensor) -> Tensor:
        num_tokens, head_dim = len(qkv), len(self.query_weight)
        num_normed = self.num_heads + self.num_kv_heads
        _head_norm_kernel[(num_tokens, triton.cdiv(num_normed, HEADS_PER_PROGRAM))](
            qkv, self.query_weight, self.key_weight, qkv.stride(0), self.num_heads, num_normed, self.eps,
            HEADS=HEADS_PER_PROGRAM, HEAD_DIM=head_dim, BLOCK=triton.next_power_of_2(head_dim), num_warps=4,
        )  # fmt: skip
        return qkv


@triton.jit
def _head_norm_kernel(
    qkv_ptr, query_weight_ptr, key_weight_ptr, qkv_stride, num_heads, num_normed, eps,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    columns = tl.arange(0, BLOCK)
    in_head = columns < HEAD_DIM
    inside = (heads < num_normed)[:, None] & in_head[None, :]
    at = qkv_ptr + tl.program_id(0).to(tl.int64) * qkv_stride + heads[:, None] * HEAD_DIM + columns[None, :]
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    query_weight = tl.load(query_weight_ptr + columns, mask=in_head, other=0.0).to(tl.float32)
    key_weight = tl.load(key_weight_ptr + columns, mask=in_head, other=0.0).to(tl.float32)
    weight = tl.where((heads < num_heads)[:, None], query_weight[None, :], key_weight[None, :])
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)
    tl.store(at, (x * scale[:, None] * weight).to(qkv_ptr.dtype.element_ty), mask=inside)
