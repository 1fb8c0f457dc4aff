"""Paged decode attention in Triton: one new row per sequence, any page size, sequences of any length in one graph.

Twin of engine.attention.sdpa for decode rows. A program takes the queries that share one KV head and one part of the
context; with several parts a second launch joins them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.batch import AttentionMetadata
from engine.layers.launch import launch_options, let_next_start, wait_for_inputs

TILE_TOKENS = 32
MIN_DOT_ROWS = 16
WANTED_PROGRAMS_PER_CORE = 4
MAX_PARTS = 8


class PagedDecodeAttention:
    name = "paged_decode"
    graphable = True

    def __init__(self, device: torch.device) -> None:
        self._num_cores = torch.cuda.get_device_properties(device).multi_processor_count

    def decode(self, queries: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata) -> Tensor:
        num_sequences = len(queries)
        table = metadata.block_table[:num_sequences]
        parts = num_parts(num_sequences, keys.shape[2], table.shape[1] * keys.shape[1], self._num_cores)
        return paged_decode(queries, keys, values, table, metadata.context_lens_dev, parts)


def num_parts(num_sequences: int, num_kv_heads: int, max_context: int, num_cores: int) -> int:
    """Into how many parts each context is cut so that the card is full; 1 when the sequences alone fill it."""
    wanted = triton.cdiv(WANTED_PROGRAMS_PER_CORE * num_cores, num_sequences * num_kv_heads)
    return max(1, min(wanted, MAX_PARTS, triton.cdiv(max_context, TILE_TOKENS)))


def paged_decode(
    queries: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, context_lens: Tensor, parts: int
) -> Tensor:
    """[N, H, head_dim] queries over [num_blocks, block_size, num_kv_heads, head_dim] pages -> [N, H, head_dim].

    ``block_table`` [N, >= blocks of the longest context] and ``context_lens`` [N] are int32; a context has at least
    one token.
    """
    num_sequences, num_heads, head_dim = queries.shape
    block_size, num_kv_heads = keys.shape[1:3]
    group = num_heads // num_kv_heads
    out = queries.new_empty(num_sequences, num_heads, head_dim)
    wide = queries.new_empty(num_sequences, num_heads, parts, head_dim, dtype=torch.float32) if parts > 1 else out
    log_sums = queries.new_empty(num_sequences, num_heads, parts, dtype=torch.float32)
    options = launch_options(queries.device)
    _paged_decode_kernel[(num_sequences, num_kv_heads, parts)](
        queries, keys, values, block_table, context_lens, wide, log_sums,
        queries.stride(0), block_table.stride(0), num_kv_heads, head_dim**-0.5,
        GROUP=group, ROWS=max(MIN_DOT_ROWS, triton.next_power_of_2(group)), HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        TILE=TILE_TOKENS, num_warps=4 if parts > 1 else 1, num_stages=3, **options,
    )  # fmt: skip
    if parts > 1:
        _join_kernel[(num_sequences * num_heads,)](
            wide, log_sums, out,
            PARTS=parts, BLOCK=triton.next_power_of_2(parts), HEAD_DIM=head_dim, num_warps=1, **options,
        )  # fmt: skip
    return out


@triton.jit
def _paged_decode_kernel(
    queries_ptr, keys_ptr, values_ptr, table_ptr, context_lens_ptr, out_ptr, log_sums_ptr,
    query_stride, table_stride, num_kv_heads, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    sequence, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_parts = tl.num_programs(2)
    context_len = tl.load(context_lens_ptr + sequence)
    part_len = tl.cdiv(tl.cdiv(context_len, TILE), num_parts) * TILE
    start = part * part_len
    end = tl.minimum(start + part_len, context_len)

    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, HEAD_DIM)
    offsets = tl.arange(0, TILE)
    head = kv_head * GROUP + rows
    wait_for_inputs(DEPENDENT)
    let_next_start(DEPENDENT)
    queries_at = queries_ptr + sequence.to(tl.int64) * query_stride + head[:, None] * HEAD_DIM + columns[None, :]
    queries = tl.load(queries_at, mask=(rows < GROUP)[:, None], other=0.0)
    best = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    out = tl.zeros([ROWS, HEAD_DIM], dtype=tl.float32)
    for at in range(start, end, TILE):
        positions = at + offsets
        inside = positions < end
        blocks = tl.load(table_ptr + sequence * table_stride + positions // BLOCK_SIZE, mask=inside, other=0)
        slots = blocks.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
        kv_at = (slots[:, None] * num_kv_heads + kv_head) * HEAD_DIM + columns[None, :]
        keys = tl.load(keys_ptr + kv_at, mask=inside[:, None], other=0.0)
        values = tl.load(values_ptr + kv_at, mask=inside[:, None], other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        shrink = tl.exp(best - new_best)
        shares = tl.exp(scores - new_best[:, None])
        total = total * shrink + tl.sum(shares, axis=1)
        out = tl.dot(shares.to(values.dtype), values, out * shrink[:, None], input_precision="ieee")
        best = new_best
    out = out / tl.where(total > 0, total, 1.0)[:, None]  # a short context leaves its last parts empty
    target = (sequence.to(tl.int64) * num_kv_heads * GROUP + head) * num_parts + part
    tl.store(log_sums_ptr + target, best + tl.log(total), mask=rows < GROUP)
    out_at = out_ptr + target[:, None] * HEAD_DIM + columns[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=(rows < GROUP)[:, None])


@triton.jit
def _join_kernel(
    wide_ptr, log_sums_ptr, out_ptr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    let_next_start(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, BLOCK)
    columns = tl.arange(0, HEAD_DIM)
    log_sums = tl.load(log_sums_ptr + row * PARTS + parts, mask=parts < PARTS, other=float("-inf"))
    shares = tl.exp(log_sums - tl.max(log_sums, axis=0))
    wide_at = wide_ptr + (row * PARTS + parts[:, None]) * HEAD_DIM + columns[None, :]
    wide = tl.load(wide_at, mask=(parts < PARTS)[:, None], other=0.0)
    out = tl.sum(wide * shares[:, None], axis=0) / tl.sum(shares, axis=0)
    tl.store(out_ptr + row * HEAD_DIM + columns, out.to(out_ptr.dtype.element_ty))
