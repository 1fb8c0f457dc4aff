"""Triton twins of the small layers: norm with residual sum, rotation with KV write, gated activation.

Letters: see engine/types.py. Each function computes what its plain torch reference does, in one launch and with
float32 inside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kv_cache.storage import KvStorage
from engine.layers.launch import launch_options, let_next_start, wait_for_inputs
from engine.layers.norm import RmsNorm
from engine.layers.rotary import RotaryEmbedding


def embed(
    token_ids: Tensor, positions: Tensor, embedding: Tensor, rotary: RotaryEmbedding, dimmed_pairs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of engine.layers.embedding.embed."""
    num_tokens, hidden_size, head_dim = len(token_ids), embedding.shape[1], rotary.cos.shape[1]
    x = embedding.new_empty(num_tokens, hidden_size)
    cos, sin = (rotary.cos.new_empty(num_tokens, head_dim) for _ in range(2))
    _embed_kernel[(num_tokens,)](
        token_ids, positions, embedding, rotary.cos, rotary.sin, x, cos, sin, dimmed_pairs,
        D=hidden_size, BLOCK_D=triton.next_power_of_2(hidden_size),
        HEAD_DIM=head_dim, BLOCK_H=triton.next_power_of_2(head_dim), **launch_options(x.device),
    )  # fmt: skip
    return x, cos, sin


@triton.jit
def _embed_kernel(
    token_ids_ptr, positions_ptr, embedding_ptr, all_cos_ptr, all_sin_ptr, x_ptr, cos_ptr, sin_ptr, dimmed_ptr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    in_head = tl.arange(0, BLOCK_H)
    wait_for_inputs(DEPENDENT)
    let_next_start(DEPENDENT)
    token = tl.load(token_ids_ptr + row).to(tl.int64)
    angle_at = tl.load(positions_ptr + row).to(tl.int64) * HEAD_DIM + in_head
    x = tl.load(embedding_ptr + token * D + columns, mask=columns < D)
    tl.store(x_ptr + row * D + columns, x, mask=columns < D)
    tl.store(
        cos_ptr + row * HEAD_DIM + in_head,
        tl.load(all_cos_ptr + angle_at, mask=in_head < HEAD_DIM),
        mask=in_head < HEAD_DIM,
    )
    tl.store(
        sin_ptr + row * HEAD_DIM + in_head,
        tl.load(all_sin_ptr + angle_at, mask=in_head < HEAD_DIM),
        mask=in_head < HEAD_DIM,
    )
    tl.store(dimmed_ptr + row, tl.zeros([], dtype=tl.int64))


class FusedRmsNorm(RmsNorm):
    """RmsNorm in one launch. ``add`` also takes a stack of addends [S, T, D], summed on the way."""

    __slots__ = ()

    def __call__(self, x: Tensor) -> Tensor:  # [T, D] -> [T, D]
        normed = torch.empty_like(x)
        self._launch(x, x, 0, x, normed)
        return normed

    def add(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        total, normed = torch.empty_like(x), torch.empty_like(x)
        self._launch(x, delta, delta.numel() // x.numel(), total, normed)
        return total, normed

    def _launch(self, x: Tensor, delta: Tensor, num_addends: int, total: Tensor, normed: Tensor) -> None:
        num_tokens, hidden = x.shape
        _add_rms_norm_kernel[(num_tokens,)](
            x, delta, self.weight, total, normed, num_tokens, self.eps, NUM_ADDENDS=num_addends,
            D=hidden, BLOCK_D=triton.next_power_of_2(hidden), num_warps=16 if num_tokens <= MAX_LATENCY_TOKENS else 8,
            **launch_options(x.device),
        )  # fmt: skip


MAX_LATENCY_TOKENS = 512  # up to here one row's latency decides, beyond the bytes of all


@triton.jit(do_not_specialize=["num_tokens"])
def _add_rms_norm_kernel(
    x_ptr, delta_ptr, weight_ptr, total_ptr, normed_ptr, num_tokens, eps,
    NUM_ADDENDS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(DEPENDENT)
    let_next_start(DEPENDENT)
    total = tl.load(x_ptr + row * D + columns, mask=inside, other=0.0).to(tl.float32)
    for addend in tl.static_range(NUM_ADDENDS):
        at = (addend * num_tokens + row) * D
        total += tl.load(delta_ptr + at + columns, mask=inside, other=0.0).to(tl.float32)
    if NUM_ADDENDS > 0:
        total = total.to(total_ptr.dtype.element_ty).to(tl.float32)
        tl.store(total_ptr + row * D + columns, total.to(total_ptr.dtype.element_ty), mask=inside)
    scale = tl.rsqrt(tl.sum(total * total) / D + eps)
    tl.store(normed_ptr + row * D + columns, (total * scale * weight).to(normed_ptr.dtype.element_ty), mask=inside)


def rotate_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, slots: Tensor, kv: KvStorage, layer: int
) -> Tensor:
    """Twin of engine.layers.rotary.rotate_and_store; the queries are a view of ``qkv``, rotated in place."""
    num_tokens = qkv.shape[0]
    num_kv_heads, head_dim = kv.keys.shape[-2:]
    total_heads = num_heads + 2 * num_kv_heads
    _rotate_and_store_kernel[(num_tokens, triton.cdiv(total_heads, HEADS_PER_PROGRAM))](
        qkv, cos, sin, slots, kv.keys[layer], kv.values[layer], qkv.stride(0), num_heads, num_kv_heads,
        HEADS=HEADS_PER_PROGRAM, HEAD_DIM=head_dim, HALF=triton.next_power_of_2(head_dim // 2), num_warps=4,
        **launch_options(qkv.device),
    )  # fmt: skip
    return qkv[:, : num_heads * head_dim].unflatten(-1, (num_heads, head_dim))


HEADS_PER_PROGRAM = 16


@triton.jit
def _rotate_and_store_kernel(
    qkv_ptr, cos_ptr, sin_ptr, slots_ptr, keys_ptr, values_ptr, qkv_stride, num_heads, num_kv_heads,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    columns = tl.arange(0, HALF)
    in_half = (columns < HEAD_DIM // 2)[None, :]
    is_query = (heads < num_heads)[:, None]
    is_key = ((heads >= num_heads) & (heads < num_heads + num_kv_heads))[:, None]
    is_value = ((heads >= num_heads + num_kv_heads) & (heads < num_heads + 2 * num_kv_heads))[:, None]
    source = qkv_ptr + row.to(tl.int64) * qkv_stride + heads[:, None] * HEAD_DIM + columns[None, :]
    inside = in_half & (is_query | is_key | is_value)
    cos = tl.load(cos_ptr + row * HEAD_DIM + columns[None, :], mask=in_half)
    sin = tl.load(sin_ptr + row * HEAD_DIM + columns[None, :], mask=in_half)
    slot = tl.load(slots_ptr + row).to(tl.int64) * num_kv_heads * HEAD_DIM
    wait_for_inputs(DEPENDENT)
    let_next_start(DEPENDENT)
    first = tl.load(source, mask=inside)
    second = tl.load(source + HEAD_DIM // 2, mask=inside)
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    rotated_first = (wide_first * cos - wide_second * sin).to(first.dtype)
    rotated_second = (wide_second * cos + wide_first * sin).to(second.dtype)
    tl.store(source, rotated_first, mask=in_half & is_query)
    tl.store(source + HEAD_DIM // 2, rotated_second, mask=in_half & is_query)
    keys_at = keys_ptr + slot + (heads - num_heads)[:, None] * HEAD_DIM + columns[None, :]
    tl.store(keys_at, rotated_first, mask=in_half & is_key)
    tl.store(keys_at + HEAD_DIM // 2, rotated_second, mask=in_half & is_key)
    values_at = values_ptr + slot + (heads - num_heads - num_kv_heads)[:, None] * HEAD_DIM + columns[None, :]
    tl.store(values_at, first, mask=in_half & is_value)
    tl.store(values_at + HEAD_DIM // 2, second, mask=in_half & is_value)


def silu_and_mul_gated(gate_up: Tensor, share_logits: Tensor) -> Tensor:
    """silu(gate) * up * sigmoid(share_logits); [T, 2F] and [T] -> [T, F]."""
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_tokens, size)
    block = min(1024, triton.next_power_of_2(size))
    _silu_and_mul_gated_kernel[(num_tokens, triton.cdiv(size, block))](
        gate_up, share_logits, out, size, BLOCK=block, **launch_options(gate_up.device)
    )  # fmt: skip
    return out


@triton.jit
def _silu_and_mul_gated_kernel(
    gate_up_ptr, share_logits_ptr, out_ptr, size, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    let_next_start(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate = tl.load(gate_up_ptr + row * 2 * size + columns, mask=inside).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * size + size + columns, mask=inside).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up * tl.sigmoid(tl.load(share_logits_ptr + row))
    tl.store(out_ptr + row * size + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


def choose_likeliest(logits: Tensor, chosen: Tensor, newest: Tensor, places: Tensor) -> None:
    """chosen[t] = newest[places[t]] = index of the largest of logits[t], the lowest among equals.

    ``logits`` [T, V], ``chosen`` [T] int64, ``newest`` [> all places] int32, ``places`` [T].
    """
    num_tokens, vocab_size = logits.shape
    num_parts = triton.cdiv(vocab_size, ARGMAX_BLOCK)
    best = torch.empty(num_tokens, num_parts, dtype=torch.float32, device=logits.device)
    index = torch.empty(num_tokens, num_parts, dtype=torch.int64, device=logits.device)
    options = launch_options(logits.device)
    _argmax_part_kernel[(num_tokens, num_parts)](
        logits, best, index, vocab_size, BLOCK=ARGMAX_BLOCK, num_warps=8, **options
    )
    _argmax_kernel[(num_tokens,)](
        best, index, chosen, newest, places, num_parts, BLOCK=triton.next_power_of_2(num_parts), num_warps=1, **options
    )


ARGMAX_BLOCK = 8192


@triton.jit
def _argmax_part_kernel(
    logits_ptr, best_ptr, index_ptr, vocab_size, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    let_next_start(DEPENDENT)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(logits_ptr + row * vocab_size + columns, mask=columns < vocab_size, other=float("-inf"))
    at = row * tl.num_programs(1) + part
    best, index = tl.max(values.to(tl.float32), axis=0, return_indices=True)
    tl.store(best_ptr + at, best)
    tl.store(index_ptr + at, (part * BLOCK + index).to(tl.int64))


@triton.jit
def _argmax_kernel(
    best_ptr, index_ptr, chosen_ptr, newest_ptr, places_ptr, num_parts,
    BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    let_next_start(DEPENDENT)
    row = tl.program_id(0)
    parts = tl.arange(0, BLOCK)
    values = tl.load(best_ptr + row * num_parts + parts, mask=parts < num_parts, other=float("-inf"))
    index = tl.load(index_ptr + row * num_parts + tl.argmax(values, axis=0))
    tl.store(chosen_ptr + row, index)
    tl.store(newest_ptr + tl.load(places_ptr + row), index.to(tl.int32))
