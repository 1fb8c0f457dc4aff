"""Groups a step's (token, expert) pairs by expert into tiles of rows: a stable counting sort on the device.

Legend: T tokens, A experts per token, P = T A pairs, N packed experts. Pair p is column p % A of token p // A. An id of
N means "no expert"; such pairs sort last, into tiles of their own. Shapes depend on P and N only, so that nothing is
copied to the host and one CUDA graph serves every routing.

A small step sorts in one launch by comparing all pairs with all. Its kernel is kept short by rolled loops: between two
layers the weights flush the caches, so that a launch costs about half a microsecond per kilobyte of code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.layers.launch import launch_options, let_next_start, wait_for_inputs

SMALL_STEP_PAIRS = 1024
PAIRS_PER_PROGRAM = 32
CHUNK_PAIRS = 128
CHUNKS_PER_SCAN_STEP = 32


@dataclass(frozen=True, slots=True)
class Alignment:
    """P (token, expert) pairs, sorted by expert and cut into tiles of one expert each."""

    order: Tensor  # [P] int32: pairs, sorted by expert
    tiles: Tensor  # [max_tiles, 3] int32: expert, first row in ``order``, one past its last row
    num_tiles: Tensor  # [1] int32; tiles from there on hold nothing

    @staticmethod
    def empty(num_pairs: int, num_packed: int, tile_rows: int, device: torch.device) -> Alignment:
        """To be filled by a kernel, with as many tiles as any routing can need."""
        max_active = min(num_pairs, num_packed + 1)
        max_tiles = (num_pairs + max_active * (tile_rows - 1)) // tile_rows
        return Alignment(
            torch.empty(num_pairs, dtype=torch.int32, device=device),
            torch.empty(max_tiles, 3, dtype=torch.int32, device=device),
            torch.empty(1, dtype=torch.int32, device=device),
        )


def align(ids: Tensor, num_packed: int, tile_rows: int, load: Tensor | None = None) -> Alignment:
    """Sort the pairs of ``ids`` [T, A] int32 and cut each expert's into tiles of at most ``tile_rows`` rows.

    ``load`` [> N] int64: each expert's pairs are added to its entry, and the number of active experts to the last one.
    """
    num_pairs, load_end = ids.numel(), 0 if load is None else len(load) - 1
    alignment = Alignment.empty(num_pairs, num_packed, tile_rows, ids.device)
    num_bins, options = triton.next_power_of_2(num_packed + 1), launch_options(ids.device)
    if num_pairs <= SMALL_STEP_PAIRS:
        _sort_kernel[(triton.cdiv(num_pairs, PAIRS_PER_PROGRAM) + 1,)](
            ids, alignment.order, alignment.tiles, alignment.num_tiles, load, num_packed, load_end,
            num_pairs, tile_rows,
            OWN=PAIRS_PER_PROGRAM, BINS=num_bins, num_warps=8, **options,
        )  # fmt: skip
        return alignment
    num_chunks = triton.cdiv(num_pairs, CHUNK_PAIRS)
    counts = torch.empty(num_chunks + 1, num_bins, dtype=torch.int32, device=ids.device)
    _count_kernel[(num_chunks,)](ids, counts, num_pairs, CHUNK=CHUNK_PAIRS, BINS=num_bins, num_warps=8, **options)
    _scan_kernel[(1,)](
        counts, alignment.tiles, alignment.num_tiles, load, num_packed, load_end, num_chunks, tile_rows,
        CHUNKS=CHUNKS_PER_SCAN_STEP, BINS=num_bins, num_warps=8, **options,
    )  # fmt: skip
    _scatter_kernel[(num_chunks,)](
        ids, counts, alignment.order, num_pairs, CHUNK=CHUNK_PAIRS, BINS=num_bins, num_warps=8, **options
    )
    return alignment


@triton.jit(do_not_specialize=["num_pairs"])
def _sort_kernel(
    ids_ptr, order_ptr, tiles_ptr, num_tiles_ptr, load_ptr, num_packed, load_end, num_pairs, tile_rows,
    OWN: tl.constexpr, BINS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Each program places OWN pairs, each behind all that sort before it; the last program lists the tiles."""
    step = tl.arange(0, OWN)
    wait_for_inputs(DEPENDENT)
    let_next_start(DEPENDENT)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        is_bin = tl.zeros([BINS, OWN], dtype=tl.int32)
        for start in range(0, num_pairs, OWN):
            ids = tl.load(ids_ptr + start + step, mask=start + step < num_pairs, other=BINS)
            is_bin += (ids[None, :] == tl.arange(0, BINS)[:, None]).to(tl.int32)
        counts = tl.sum(is_bin, axis=1)
        list_tiles(counts, tiles_ptr, num_tiles_ptr, tile_rows, BINS)
        if load_ptr is not None:
            add_load(counts, load_ptr, num_packed, load_end, BINS)
        return
    own_pairs = tl.program_id(0) * OWN + step
    own_ids = tl.load(ids_ptr + own_pairs, mask=own_pairs < num_pairs, other=BINS)
    sorts_before = tl.zeros([OWN, OWN], dtype=tl.int32)
    for start in range(0, num_pairs, OWN):
        pairs = start + step
        ids = tl.load(ids_ptr + pairs, mask=pairs < num_pairs, other=BINS)
        is_earlier = (ids[None, :] == own_ids[:, None]) & (pairs[None, :] < own_pairs[:, None])
        sorts_before += ((ids[None, :] < own_ids[:, None]) | is_earlier).to(tl.int32)
    tl.store(order_ptr + tl.sum(sorts_before, axis=1), own_pairs, mask=own_pairs < num_pairs)


@triton.jit
def _count_kernel(
    ids_ptr, counts_ptr, num_pairs, CHUNK: tl.constexpr, BINS: tl.constexpr, DEPENDENT: tl.constexpr
):  # fmt: skip
    """counts[1 + chunk, id]: the chunk's pairs of each id. Row 0 is for the scan."""
    wait_for_inputs(DEPENDENT)
    let_next_start(DEPENDENT)
    pairs = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    bins = tl.arange(0, BINS)
    ids = tl.load(ids_ptr + pairs, mask=pairs < num_pairs, other=BINS)
    counts = tl.sum((ids[:, None] == bins[None, :]).to(tl.int32), axis=0)
    tl.store(counts_ptr + (tl.program_id(0) + 1) * BINS + bins, counts)


@triton.jit
def _scan_kernel(
    counts_ptr, tiles_ptr, num_tiles_ptr, load_ptr, num_packed, load_end, num_chunks, tile_rows,
    CHUNKS: tl.constexpr, BINS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """counts -> pairs of that id in earlier chunks; row 0 -> the id's first sorted row. Also lists the tiles."""
    wait_for_inputs(DEPENDENT)
    let_next_start(DEPENDENT)
    bins = tl.arange(0, BINS)
    total = tl.zeros([BINS], dtype=tl.int32)
    for start in range(0, num_chunks, CHUNKS):
        chunks = start + tl.arange(0, CHUNKS)
        at = counts_ptr + (chunks[:, None] + 1) * BINS + bins[None, :]
        counts = tl.load(at, mask=chunks[:, None] < num_chunks, other=0)
        tl.store(at, total[None, :] + tl.cumsum(counts, axis=0) - counts, mask=chunks[:, None] < num_chunks)
        total += tl.sum(counts, axis=0)
    tl.store(counts_ptr + bins, tl.cumsum(total, axis=0) - total)
    list_tiles(total, tiles_ptr, num_tiles_ptr, tile_rows, BINS)
    if load_ptr is not None:
        add_load(total, load_ptr, num_packed, load_end, BINS)


@triton.jit
def _scatter_kernel(
    ids_ptr, counts_ptr, order_ptr, num_pairs, CHUNK: tl.constexpr, BINS: tl.constexpr, DEPENDENT: tl.constexpr
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    let_next_start(DEPENDENT)
    chunk = tl.program_id(0)
    pairs = chunk * CHUNK + tl.arange(0, CHUNK)
    bins = tl.arange(0, BINS)
    ids = tl.load(ids_ptr + pairs, mask=pairs < num_pairs, other=BINS)
    base = tl.load(counts_ptr + bins) + tl.load(counts_ptr + (chunk + 1) * BINS + bins)
    is_id = (ids[:, None] == bins[None, :]).to(tl.int32)
    row = tl.sum(is_id * (base[None, :] + tl.cumsum(is_id, axis=0) - 1), axis=1)
    tl.store(order_ptr + row, pairs, mask=pairs < num_pairs)


@triton.jit
def list_tiles(counts, tiles_ptr, num_tiles_ptr, tile_rows, BINS: tl.constexpr):
    """The tiles of bins with ``counts`` [BINS] pairs each, and how many these are."""
    bins = tl.arange(0, BINS)
    row_end = tl.cumsum(counts, axis=0)
    first_row = row_end - counts
    num_tiles = (counts + tile_rows - 1) // tile_rows
    first_tile = tl.cumsum(num_tiles, axis=0) - num_tiles
    for i in range(tl.max(num_tiles, axis=0)):
        at = tiles_ptr + (first_tile + i) * 3
        row = first_row + i * tile_rows
        tl.store(at, bins, mask=i < num_tiles)
        tl.store(at + 1, row, mask=i < num_tiles)
        tl.store(at + 2, tl.minimum(row + tile_rows, row_end), mask=i < num_tiles)
    tl.store(num_tiles_ptr, tl.sum(num_tiles, axis=0))


@triton.jit
def add_load(counts, load_ptr, num_packed, load_end, BINS: tl.constexpr):
    """Nobody waits for it: nothing is read back."""
    bins = tl.arange(0, BINS)
    is_active = (counts > 0) & (bins < num_packed)
    tl.atomic_add(load_ptr + bins, counts.to(tl.int64), mask=is_active, sem="relaxed")
    tl.atomic_add(load_ptr + load_end, tl.sum(is_active.to(tl.int64), axis=0), sem="relaxed")
