"""Paged decode attention in Triton: one new row per sequence, any page size, sequences of any length in one graph.

Twin of engine.attention.sdpa for decode rows. Contexts differ much in length, and one long one must not keep the card
waiting: once per step a plan cuts those longer than a common limit, the least for which the parts are few enough. A
program takes one part and the queries that share one KV head; the last one of a sequence to end joins its parts.

Legend: N sequences, P parts, H query heads, K KV heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.attention.base import DecodeBackend
from engine.batch import AttentionMetadata
from engine.layers.launch import launch_options, let_next_start, wait_for_inputs

TILE_TOKENS = 32
MIN_DOT_ROWS = 16
WANTED_PROGRAMS_PER_CORE = 4
MAX_EVEN_PARTS = 8
SPARE_PARTS = 32  # for contexts longer than others; or, if more, a quarter as many as sequences
JOINED_ROWS = 8  # partial results that are read side by side, parts times heads
SEARCH_STEPS = 16  # contexts of up to 2 ** 16 tiles
PART_COLUMNS = 4  # of a plan: sequence, first token, end, parts of the sequence (0: nothing to do)


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """How the contexts of a step are cut, the same in all its layers. Written on the device."""

    parts: Tensor  # [P, PART_COLUMNS] int32; a sequence's parts are neighbours
    first_parts: Tensor  # [N] int32
    arrived: Tensor  # [N, K] int32, zero between launches


class PagedDecodeAttention(DecodeBackend):
    name = "paged_decode"
    graphable = True

    def __init__(self, device: torch.device) -> None:
        self._num_cores = torch.cuda.get_device_properties(device).multi_processor_count
        self._plan: DecodePlan
        self._num_warps: int

    def begin_step(self, metadata: AttentionMetadata, num_kv_heads: int) -> None:
        num_sequences = metadata.num_decodes
        even = even_parts(num_sequences, num_kv_heads, self._num_cores)
        num_parts = max_parts(num_sequences, even)
        self._plan = plan(metadata.context_lens_dev[:num_sequences], num_kv_heads, num_parts)
        self._num_warps = 4 if even > 1 else 1

    def decode(self, queries: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata) -> Tensor:
        return paged_decode(queries, keys, values, metadata.block_table, self._plan, self._num_warps)


def even_parts(num_sequences: int, num_kv_heads: int, num_cores: int) -> int:
    """Into how many parts contexts of one length are cut so that the card is full; 1 when they fill it whole."""
    wanted = triton.cdiv(WANTED_PROGRAMS_PER_CORE * num_cores, num_sequences * num_kv_heads)
    return max(1, min(wanted, MAX_EVEN_PARTS))


def max_parts(num_sequences: int, even: int) -> int:
    """P of a step. Where contexts are cut evenly anyhow, that many parts are enough to cut them unevenly."""
    if even > 1:
        return num_sequences * even
    return num_sequences + max(SPARE_PARTS, num_sequences // 4)


def plan(context_lens: Tensor, num_kv_heads: int, num_parts: int) -> DecodePlan:
    """Cut contexts [N] int32, each of at least one token, into at most ``num_parts`` >= N parts."""
    num_sequences, device = len(context_lens), context_lens.device
    parts = torch.empty(num_parts, PART_COLUMNS, dtype=torch.int32, device=device)
    first_parts = torch.empty_like(context_lens)
    arrived = torch.empty(num_sequences, num_kv_heads, dtype=torch.int32, device=device)
    _plan_kernel[(1,)](
        context_lens, parts, first_parts, arrived, num_sequences, num_parts,
        KV_HEADS=num_kv_heads, TILE=TILE_TOKENS, STEPS=SEARCH_STEPS, COLUMNS=PART_COLUMNS,
        BLOCK_N=triton.next_power_of_2(num_sequences), BLOCK_P=triton.next_power_of_2(num_parts),
        BLOCK_K=triton.next_power_of_2(num_kv_heads), num_warps=4, **launch_options(device),
    )  # fmt: skip
    return DecodePlan(parts, first_parts, arrived)


def paged_decode(
    queries: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, plan: DecodePlan, num_warps: int
) -> Tensor:
    """[N, H, head_dim] queries over [num_blocks, block_size, K, head_dim] pages -> [N, H, head_dim].

    ``block_table`` [>= N, >= blocks of the longest context] int32. Not to be launched right behind the plan, which the
    kernel reads before its wait, when only older kernels are sure to have ended.
    """
    num_sequences, num_heads, head_dim = queries.shape
    block_size, num_kv_heads = keys.shape[1:3]
    num_parts, group = len(plan.parts), num_heads // num_kv_heads
    join_heads = triton.next_power_of_2(group)
    out = queries.new_empty(num_sequences, num_heads, head_dim)
    wide = queries.new_empty(num_parts, num_heads, head_dim, dtype=torch.float32)
    log_sums = queries.new_empty(num_parts, num_heads, dtype=torch.float32)
    # Heads first: parts that do not exist then come last and leave no gaps among the cores.
    _paged_decode_kernel[(num_kv_heads, num_parts)](
        queries, keys, values, block_table, plan.parts, plan.first_parts, plan.arrived, out, wide, log_sums,
        queries.stride(0), block_table.stride(0), num_kv_heads, head_dim**-0.5,
        GROUP=group, ROWS=max(MIN_DOT_ROWS, join_heads), HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        TILE=TILE_TOKENS, COLUMNS=PART_COLUMNS, JOIN_HEADS=join_heads, JOIN_PARTS=max(1, JOINED_ROWS // join_heads),
        num_warps=num_warps, num_stages=3, **launch_options(queries.device),
    )  # fmt: skip
    return out


@triton.jit
def _plan_kernel(
    context_lens_ptr, parts_ptr, first_parts_ptr, arrived_ptr, num_sequences, num_parts,
    KV_HEADS: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    let_next_start(DEPENDENT)
    sequences = tl.arange(0, BLOCK_N)
    inside = sequences < num_sequences
    context_lens = tl.load(context_lens_ptr + sequences, mask=inside, other=0)
    tiles = tl.cdiv(context_lens, TILE)
    low, high = 1, tl.max(tiles, axis=0)
    for _ in range(STEPS):
        middle = (low + high) // 2
        fits = tl.sum(tl.cdiv(tiles, middle), axis=0) <= num_parts
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, tl.minimum(middle + 1, high))
    counts = tl.cdiv(tiles, high)
    ends = tl.cumsum(counts, axis=0)
    firsts = ends - counts
    tl.store(first_parts_ptr + sequences, firsts, mask=inside)
    heads = tl.arange(0, BLOCK_K)[None, :]
    tl.store(arrived_ptr + sequences[:, None] * KV_HEADS + heads, 0, mask=inside[:, None] & (heads < KV_HEADS))
    parts = tl.arange(0, BLOCK_P)
    unused = (parts >= tl.sum(counts, axis=0)) & (parts < num_parts)
    tl.store(parts_ptr + parts * COLUMNS + 3, 0, mask=unused)
    for part in range(tl.max(counts, axis=0)):
        cut = inside & (part < counts)
        at = parts_ptr + (firsts + part) * COLUMNS
        start = part * high * TILE
        tl.store(at, sequences, mask=cut)
        tl.store(at + 1, start + tl.zeros_like(context_lens), mask=cut)
        tl.store(at + 2, tl.minimum(start + high * TILE, context_lens), mask=cut)
        tl.store(at + 3, counts, mask=cut)


@triton.jit
def _paged_decode_kernel(
    queries_ptr, keys_ptr, values_ptr, table_ptr, parts_ptr, first_parts_ptr, arrived_ptr, out_ptr, wide_ptr,
    log_sums_ptr, query_stride, table_stride, num_kv_heads, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    COLUMNS: tl.constexpr, JOIN_HEADS: tl.constexpr, JOIN_PARTS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    kv_head, part = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(parts_ptr + part * COLUMNS)
    start = tl.load(parts_ptr + part * COLUMNS + 1)
    end = tl.load(parts_ptr + part * COLUMNS + 2)
    num_parts = tl.load(parts_ptr + part * COLUMNS + 3)
    if num_parts == 0:
        return

    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, HEAD_DIM)
    offsets = tl.arange(0, TILE)
    num_heads = num_kv_heads * GROUP
    head = kv_head * GROUP + rows
    of_group = (rows < GROUP)[:, None]
    wait_for_inputs(DEPENDENT)
    let_next_start(DEPENDENT)
    queries_at = queries_ptr + sequence.to(tl.int64) * query_stride + head[:, None] * HEAD_DIM + columns[None, :]
    queries = tl.load(queries_at, mask=of_group, other=0.0)
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
    out = out / total[:, None]
    in_heads = head[:, None] * HEAD_DIM + columns[None, :]
    out_at = out_ptr + sequence.to(tl.int64) * num_heads * HEAD_DIM + in_heads
    if num_parts == 1:
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=of_group)
        return

    tl.store(wide_ptr + part.to(tl.int64) * num_heads * HEAD_DIM + in_heads, out, mask=of_group)
    tl.store(log_sums_ptr + part * num_heads + head, best + tl.log(total), mask=rows < GROUP)
    tl.debug_barrier()  # all threads' stores lie before the count, which publishes them
    arrived_at = arrived_ptr + sequence * num_kv_heads + kv_head
    if tl.atomic_add(arrived_at, 1, sem="acq_rel") == num_parts - 1:
        heads = kv_head * GROUP + tl.arange(0, JOIN_HEADS)
        first_part = tl.load(first_parts_ptr + sequence)
        joined = join(wide_ptr, log_sums_ptr, first_part, num_parts, num_heads, heads, GROUP, JOIN_PARTS, HEAD_DIM)
        joined_at = out_ptr + (sequence.to(tl.int64) * num_heads + heads)[:, None] * HEAD_DIM + columns[None, :]
        tl.store(joined_at, joined.to(out_ptr.dtype.element_ty), mask=(tl.arange(0, JOIN_HEADS) < GROUP)[:, None])
        tl.store(arrived_at, 0)


@triton.jit
def join(
    wide_ptr, log_sums_ptr, first_part, num_parts, num_heads, heads,
    GROUP: tl.constexpr, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The attention of ``heads``, of which the first GROUP exist, over all parts of a sequence, PARTS at a time."""
    columns = tl.arange(0, HEAD_DIM)
    is_head = tl.arange(0, heads.shape[0]) < GROUP
    best = tl.full([heads.shape[0]], float("-inf"), dtype=tl.float32)
    total = tl.zeros([heads.shape[0]], dtype=tl.float32)
    out = tl.zeros([heads.shape[0], HEAD_DIM], dtype=tl.float32)
    for start in range(0, num_parts, PARTS):
        parts = start + tl.arange(0, PARTS)
        at = (first_part + parts)[:, None] * num_heads + heads[None, :]  # [PARTS, heads]
        inside = (parts < num_parts)[:, None] & is_head[None, :]
        log_sums = tl.load(log_sums_ptr + at, mask=inside, other=float("-inf"), cache_modifier=".cg")
        wide_at = wide_ptr + at.to(tl.int64)[:, :, None] * HEAD_DIM + columns[None, None, :]
        wide = tl.load(wide_at, mask=inside[:, :, None], other=0.0, cache_modifier=".cg")
        new_best = tl.maximum(best, tl.max(log_sums, axis=0))
        shrink = tl.exp(best - new_best)
        shares = tl.exp(log_sums - new_best[None, :])
        total = total * shrink + tl.sum(shares, axis=0)
        out = out * shrink[:, None] + tl.sum(wide * shares[:, :, None], axis=0)
        best = new_best
    return out / total[:, None]
