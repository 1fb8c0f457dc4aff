"""Triton twins of the gate and of the dimmer: router product, softmax, top-k, mass, remap, merge; no host sync.

Legend: T tokens, E original experts, A experts per token, N packed experts, D hidden size. The rule is that of
engine.moe.dimmer. Sums run in a fixed order, so the same inputs give the same routing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.batch import RowInfo
from engine.moe.dimmer import Dimmer
from engine.moe.gate import Routing

SMALL_STEP_TOKENS = 256  # up to here latency counts, beyond throughput
MIN_CHUNK_ROWS = 16  # the matrix unit's
LARGE_CHUNK_ROWS = 64
DEPTH = 128
NUM_SPLITS = 8
CHUNKS_PER_SCAN_STEP = 16


@dataclass(frozen=True, slots=True)
class Choice:
    """What the gates say, before dimming."""

    routing: Routing
    shared_logits: Tensor  # [T] float32, the shared expert's gate
    use: Tensor  # [chunks, 2, E'] float32: mass that a chunk of rows routes to each expert; its pairs that must stay


def choose(
    x: Tensor, router: Tensor, num_experts: int, num_columns: int, normalise: bool, num_packed: int, rows: RowInfo,
    rank_by_count: bool,
) -> Choice:  # fmt: skip
    """Top ``num_columns`` of softmax(x @ router[:E].T), and x @ router[E], 0 without that row.  [T, D], [>= E, D]

    ``router`` has a power of two of rows. Rows that only pad the batch get no expert.
    """
    num_tokens, hidden_size = x.shape
    chunk_rows = MIN_CHUNK_ROWS if num_tokens <= SMALL_STEP_TOKENS else LARGE_CHUNK_ROWS
    num_chunks, block_e = triton.cdiv(num_tokens, chunk_rows), len(router)
    ids = torch.empty(num_tokens, num_columns, dtype=torch.int32, device=x.device)
    weights = torch.empty(num_tokens, num_columns, dtype=torch.float32, device=x.device)
    shared_logits = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    use = torch.empty(num_chunks, 2, block_e, dtype=torch.float32, device=x.device)
    num_splits = NUM_SPLITS if num_tokens <= SMALL_STEP_TOKENS else 1
    partial_logits = torch.empty(num_splits, num_tokens, block_e, dtype=torch.float32, device=x.device)
    _router_kernel[(num_chunks, num_splits)](
        x, router, partial_logits, num_tokens,
        D=hidden_size, SPLIT=triton.cdiv(hidden_size, num_splits), DEPTH=DEPTH, ROWS=chunk_rows, BLOCK_E=block_e,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    _choose_kernel[(num_chunks,)](
        partial_logits, rows.valid, rows.phase, rows.exact, rows.levels, ids, weights, shared_logits, use,
        num_tokens, num_experts, num_packed, num_splits,
        A=num_columns, NORMALISE=normalise, BY_COUNT=rank_by_count, ROWS=chunk_rows, BLOCK_E=block_e, num_warps=8,
    )  # fmt: skip
    return Choice(Routing(ids, weights), shared_logits, use)


def rewrite_(dimmer: Dimmer, layer: int, choice: Choice, rows: RowInfo, dimmed_pairs: Tensor) -> None:
    """Dimmer.rewrite in place of ``choice.routing``; adds each row's dimmed pairs to ``dimmed_pairs`` [T]."""
    routing = choice.routing
    num_tokens, num_columns = routing.ids.shape
    num_chunks, _, block_e = choice.use.shape
    num_experts = len(dimmer.identity)
    remap = torch.empty(2, block_e, dtype=torch.int32, device=routing.ids.device)
    _remap_kernel[(1,)](
        choice.use, rows.levels, dimmer.share, dimmer.way_row, dimmer.united_of[layer], dimmer.protected[layer],
        remap,
        num_chunks, num_experts, CHUNKS=CHUNKS_PER_SCAN_STEP, BLOCK_E=block_e, num_warps=8,
    )  # fmt: skip
    chunk_rows = MIN_CHUNK_ROWS if num_tokens <= SMALL_STEP_TOKENS else LARGE_CHUNK_ROWS
    _rewrite_kernel[(triton.cdiv(num_tokens, chunk_rows),)](
        routing.ids, routing.weights, remap, rows.phase, rows.exact, rows.levels, dimmed_pairs,
        num_tokens, num_experts, dimmer.num_packed,
        A=num_columns, BLOCK_A=triton.next_power_of_2(num_columns), ROWS=chunk_rows, BLOCK_E=block_e,
        num_warps=chunk_rows // 16,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def _router_kernel(
    x_ptr, router_ptr, partial_ptr, num_tokens,
    D: tl.constexpr, SPLIT: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """x @ router.T over one part of D; parts spread the router's bytes over the card."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * SPLIT
    experts = tl.arange(0, BLOCK_E)
    depth = first + tl.arange(0, DEPTH)
    end = tl.minimum(first + SPLIT, D)
    x_at = x_ptr + tl.where(rows < num_tokens, rows, 0).to(tl.int64)[:, None] * D
    logits = tl.zeros([ROWS, BLOCK_E], dtype=tl.float32)
    for start in range(0, SPLIT, DEPTH):
        inside = start + depth < end
        x = tl.load(x_at + start + depth[None, :], mask=inside[None, :], other=0.0)
        router = tl.load(router_ptr + experts[None, :] * D + start + depth[:, None], mask=inside[:, None], other=0.0)
        logits = tl.dot(x, router, logits, input_precision="ieee")
    target = (tl.program_id(1) * num_tokens + rows).to(tl.int64)
    tl.store(partial_ptr + target[:, None] * BLOCK_E + experts[None, :], logits, mask=(rows < num_tokens)[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def _choose_kernel(
    partial_ptr, valid_ptr, phase_ptr, exact_ptr, levels_ptr, ids_ptr, weights_ptr, shared_ptr, use_ptr,
    num_tokens, num_experts, no_expert, num_splits,
    A: tl.constexpr, NORMALISE: tl.constexpr, BY_COUNT: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_step = rows < num_tokens
    experts = tl.arange(0, BLOCK_E)
    logits = tl.zeros([ROWS, BLOCK_E], dtype=tl.float32)
    for split in range(num_splits):
        at = (split * num_tokens + rows).to(tl.int64)[:, None] * BLOCK_E + experts[None, :]
        logits += tl.load(partial_ptr + at, mask=in_step[:, None], other=0.0)
    is_shared = (experts == num_experts)[None, :]
    tl.store(shared_ptr + rows, tl.sum(tl.where(is_shared, logits, 0.0), axis=1), mask=in_step)

    logits = tl.where((experts < num_experts)[None, :], logits, float("-inf"))
    exps = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    probs = exps / tl.sum(exps, axis=1)[:, None]
    remaining = tl.where((experts < num_experts)[None, :], probs, -1.0)
    scale = tl.full([ROWS], 1.0, tl.float32)
    if NORMALISE:
        chosen_mass = tl.zeros([ROWS], dtype=tl.float32)
        unchosen = remaining
        for _ in range(A):
            best, expert = tl.max(unchosen, axis=1, return_indices=True)
            chosen_mass += best
            unchosen = tl.where(experts[None, :] == expert[:, None], -1.0, unchosen)
        scale = 1.0 / chosen_mass

    valid = in_step & (tl.load(valid_ptr + rows, mask=in_step, other=0) != 0)
    phase = tl.load(phase_ptr + rows, mask=in_step, other=0)
    exact = tl.load(exact_ptr + rows, mask=in_step, other=0) != 0
    stays = valid & (exact | (tl.load(levels_ptr + phase) == 0))
    mass = tl.zeros([ROWS, BLOCK_E], dtype=tl.float32)
    is_used = tl.zeros([ROWS, BLOCK_E], dtype=tl.float32)
    for column in range(A):
        best, expert = tl.max(remaining, axis=1, return_indices=True)
        is_chosen = experts[None, :] == expert[:, None]
        remaining = tl.where(is_chosen, -1.0, remaining)
        target = rows * A + column
        tl.store(ids_ptr + target, tl.where(valid, expert, no_expert).to(tl.int32), mask=in_step)
        tl.store(weights_ptr + target, tl.where(valid, best * scale, 0.0), mask=in_step)
        mass += tl.where(is_chosen, (best * scale)[:, None], 0.0)
        is_used += tl.where(is_chosen, 1.0, 0.0)
    if BY_COUNT:
        mass = is_used
    use = use_ptr + tl.program_id(0) * 2 * BLOCK_E + experts
    tl.store(use, tl.sum(tl.where(valid[:, None], mass, 0.0), axis=0))
    tl.store(use + BLOCK_E, tl.sum(tl.where(stays[:, None], is_used, 0.0), axis=0))


@triton.jit(do_not_specialize=["num_chunks"])
def _remap_kernel(
    use_ptr, levels_ptr, share_ptr, way_row_ptr, united_of_ptr, protected_ptr, remap_ptr, num_chunks, num_experts,
    CHUNKS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """remap[phase, expert]: where the dimmable pairs of an expert go."""
    experts = tl.arange(0, BLOCK_E)
    in_table = experts < num_experts
    mass = tl.zeros([BLOCK_E], dtype=tl.float32)
    staying = tl.zeros([BLOCK_E], dtype=tl.float32)
    for start in range(0, num_chunks, CHUNKS):
        chunks = start + tl.arange(0, CHUNKS)
        at = use_ptr + chunks[:, None] * 2 * BLOCK_E + experts[None, :]
        mass += tl.sum(tl.load(at, mask=chunks[:, None] < num_chunks, other=0.0), axis=0)
        staying += tl.sum(tl.load(at + BLOCK_E, mask=chunks[:, None] < num_chunks, other=0.0), axis=0)
    ranks_above = (mass[None, :] > mass[:, None]) | (
        (mass[None, :] == mass[:, None]) & (experts[None, :] < experts[:, None])
    )
    mass_above = tl.sum(tl.where(ranks_above, mass[None, :], 0.0), axis=1)
    protected = tl.load(protected_ptr + experts, mask=in_table, other=1) != 0
    may_move = (mass > 0) & (staying == 0) & ~protected
    for phase in range(2):
        level = tl.load(levels_ptr + phase)
        cold = may_move & (mass_above >= (1.0 - tl.load(share_ptr + level)) * tl.sum(mass, axis=0))
        united_row = united_of_ptr + tl.load(way_row_ptr + level) * num_experts
        united = tl.load(united_row + experts, mask=in_table, other=-1).to(tl.int32)
        num_cold = tl.sum(((united[None, :] == united[:, None]) & cold[None, :]).to(tl.int32), axis=1)
        tl.store(remap_ptr + phase * BLOCK_E + experts, tl.where(cold & (num_cold >= 2), united, experts))


@triton.jit(do_not_specialize=["num_tokens"])
def _rewrite_kernel(
    ids_ptr, weights_ptr, remap_ptr, phase_ptr, exact_ptr, levels_ptr, dimmed_ptr, num_tokens, num_experts, no_expert,
    A: tl.constexpr, BLOCK_A: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_step = rows < num_tokens
    phase = tl.load(phase_ptr + rows, mask=in_step, other=0)
    exact = tl.load(exact_ptr + rows, mask=in_step, other=1) != 0
    may_dim = ~exact & (tl.load(levels_ptr + phase) > 0)

    columns = tl.arange(0, BLOCK_A)
    at = rows[:, None] * A + columns[None, :]
    inside = in_step[:, None] & (columns < A)[None, :]
    ids = tl.load(ids_ptr + at, mask=inside, other=no_expert)
    weights = tl.load(weights_ptr + at, mask=inside, other=0.0)
    moves = may_dim[:, None] & (ids < num_experts)
    new_ids = tl.load(remap_ptr + phase[:, None] * BLOCK_E + ids, mask=moves, other=0)
    new_ids = tl.where(moves, new_ids, ids)
    num_dimmed = tl.sum((new_ids != ids).to(tl.int32), axis=1)
    tl.store(dimmed_ptr + rows, tl.load(dimmed_ptr + rows, mask=in_step, other=0) + num_dimmed, mask=in_step)

    same = new_ids[:, :, None] == new_ids[:, None, :]  # [ROWS, BLOCK_A, BLOCK_A]
    is_first = tl.min(tl.where(same, columns[None, None, :], BLOCK_A), axis=2) == columns[None, :]
    spread = tl.broadcast_to(weights[:, None, :], [ROWS, BLOCK_A, BLOCK_A])
    summed = tl.sum(tl.where(same, spread, 0.0), axis=2)
    tl.store(ids_ptr + at, tl.where(is_first, new_ids, no_expert), mask=inside)
    tl.store(weights_ptr + at, tl.where(is_first, summed, 0.0), mask=inside)
