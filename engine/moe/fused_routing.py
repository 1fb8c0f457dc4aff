"""Triton twins of the gate and of the dimmer: router product, softmax, top-k, mass, remap, merge; no host sync.

Legend: T tokens, E original experts, A experts per token, P = T A pairs, N packed experts, D hidden size. The rule is
that of engine.moe.dimmer. Sums run in a fixed order, so the same inputs give the same routing.

Latency counts here: three launches, two of them when nothing may be dimmed, each short (see engine.moe.align).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.batch import RowInfo
from engine.layers.launch import launch_options, let_next_start, wait_for_inputs
from engine.moe.dimmer import Dimmer
from engine.moe.gate import Routing

SMALL_STEP_TOKENS = 256  # up to here latency counts, beyond throughput
MIN_CHUNK_ROWS = 16  # the matrix unit's
LARGE_CHUNK_ROWS = 64
DEPTH = 128
NUM_SPLITS = 16
MASS_UNIT = tl.constexpr(2.0**30)  # mass is summed in integers: exact in any order


@dataclass(frozen=True, slots=True)
class Choice:
    """What the gates say, before dimming."""

    routing: Routing
    shared_logits: Tensor  # [T] float32, the shared expert's gate
    use: Tensor | None  # [2, > E] int64: mass routed to each expert in MASS_UNIT, and its pairs that must stay


def choose(
    x: Tensor, router: Tensor, num_experts: int, num_columns: int, normalise: bool, num_packed: int, rows: RowInfo,
    dimmer: Dimmer | None,
) -> Choice:  # fmt: skip
    """Top ``num_columns`` of softmax(x @ router[:E].T), and x @ router[E], 0 without that row.  [T, D], [>= E, D]

    ``router`` has a power of two of rows. Rows that only pad the batch get no expert. With a ``dimmer``, and while a
    level is above 0, the experts' use is counted too.
    """
    num_tokens, hidden_size = x.shape
    options = launch_options(x.device)
    is_small, block_e = num_tokens <= SMALL_STEP_TOKENS, len(router)
    chunk_rows, num_splits = (MIN_CHUNK_ROWS, NUM_SPLITS) if is_small else (LARGE_CHUNK_ROWS, 1)
    ids = torch.empty(num_tokens, num_columns, dtype=torch.int32, device=x.device)
    weights = torch.empty(num_tokens, num_columns, dtype=torch.float32, device=x.device)
    shared_logits = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    partial_logits = torch.empty(num_splits, num_tokens, block_e, dtype=torch.float32, device=x.device)
    use = None if dimmer is None else torch.empty(2, block_e, dtype=torch.int64, device=x.device)
    _router_kernel[(triton.cdiv(num_tokens, chunk_rows), num_splits)](
        x, router, partial_logits, use, num_tokens,
        D=hidden_size, SPLIT=triton.cdiv(hidden_size, num_splits), DEPTH=DEPTH, ROWS=chunk_rows, BLOCK_E=block_e,
        num_warps=4, num_stages=3, **options,
    )  # fmt: skip
    _choose_kernel[(num_tokens,)](
        partial_logits, rows.valid, rows.phase, rows.exact, rows.levels, ids, weights, shared_logits, use,
        num_tokens, num_experts, num_packed,
        A=num_columns, BLOCK_A=triton.next_power_of_2(num_columns), NORMALISE=normalise,
        BY_COUNT=dimmer is not None and dimmer.rank_by_count, SPLITS=num_splits, BLOCK_E=block_e,
        num_warps=1, **options,
    )  # fmt: skip
    return Choice(Routing(ids, weights), shared_logits, use)


def rewrite(dimmer: Dimmer, layer: int, choice: Choice, rows: RowInfo, dimmed_pairs: Tensor) -> Routing:
    """Dimmer.rewrite of a choice made with this dimmer; adds each row's dimmed pairs to ``dimmed_pairs`` [T]."""
    routing, use = choice.routing, choice.use
    assert use is not None
    num_tokens, num_columns = routing.ids.shape
    chunk_rows = MIN_CHUNK_ROWS if num_tokens <= SMALL_STEP_TOKENS else LARGE_CHUNK_ROWS
    out = Routing(torch.empty_like(routing.ids), torch.empty_like(routing.weights))
    _dim_kernel[(triton.cdiv(num_tokens, chunk_rows),)](
        routing.ids, routing.weights, use, rows.phase, rows.exact, rows.levels,
        dimmer.share, dimmer.way_row, dimmer.united_of[layer], dimmer.protected[layer],
        out.ids, out.weights, dimmed_pairs, num_tokens, len(dimmer.identity), dimmer.num_packed,
        A=num_columns, BLOCK_A=triton.next_power_of_2(num_columns), ROWS=chunk_rows, BLOCK_E=use.shape[1],
        num_warps=16, **launch_options(routing.ids.device),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_tokens"])
def _router_kernel(
    x_ptr, router_ptr, partial_ptr, use_ptr, num_tokens,
    D: tl.constexpr, SPLIT: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """x @ router.T over one part of D; parts spread the router's bytes over the card. Zeroes ``use``."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * SPLIT
    experts = tl.arange(0, BLOCK_E)
    depth = first + tl.arange(0, DEPTH)
    end = tl.minimum(first + SPLIT, D)
    x_at = x_ptr + tl.where(rows < num_tokens, rows, 0).to(tl.int64)[:, None] * D
    logits = tl.zeros([ROWS, BLOCK_E], dtype=tl.float32)
    wait_for_inputs(DEPENDENT)
    let_next_start(DEPENDENT)
    if use_ptr is not None and tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(use_ptr + tl.arange(0, 2 * BLOCK_E), tl.zeros([2 * BLOCK_E], dtype=tl.int64))
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
    num_tokens, num_experts, no_expert,
    A: tl.constexpr, BLOCK_A: tl.constexpr, NORMALISE: tl.constexpr, BY_COUNT: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_E: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One row: a single warp, whose reductions need no shared memory."""
    row = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK_E)
    columns = tl.arange(0, BLOCK_A)
    splits = tl.arange(0, SPLITS)
    valid = tl.load(valid_ptr + row) != 0
    if use_ptr is not None:
        counts = valid & (tl.load(levels_ptr) + tl.load(levels_ptr + 1) > 0)
        stays = (tl.load(exact_ptr + row) != 0) | (tl.load(levels_ptr + tl.load(phase_ptr + row)) == 0)
    wait_for_inputs(DEPENDENT)
    let_next_start(DEPENDENT)
    partial = tl.load(partial_ptr + (splits[:, None] * num_tokens + row) * BLOCK_E + experts[None, :])
    logits = tl.sum(partial, axis=0)
    tl.store(shared_ptr + row, tl.sum(tl.where(experts == num_experts, logits, 0.0), axis=0))
    logits = tl.where(experts < num_experts, logits, float("-inf"))
    exps = tl.exp(logits - tl.max(logits, axis=0))
    remaining = tl.where(experts < num_experts, exps / tl.sum(exps, axis=0), -1.0)
    ids = tl.full([BLOCK_A], 0, dtype=tl.int32) + no_expert
    weights = tl.zeros([BLOCK_A], dtype=tl.float32)
    for column in range(A):
        best, expert = tl.max(remaining, axis=0, return_indices=True)
        remaining = tl.where(experts == expert, -1.0, remaining)
        ids = tl.where((columns == column) & valid, expert, ids)
        weights = tl.where((columns == column) & valid, best, weights)
    if NORMALISE:
        weights = weights / tl.where(valid, tl.sum(weights, axis=0), 1.0)
    tl.store(ids_ptr + row * A + columns, ids, mask=columns < A)
    tl.store(weights_ptr + row * A + columns, weights, mask=columns < A)
    if use_ptr is not None:
        mass = tl.full([BLOCK_A], 1, tl.int64) if BY_COUNT else (weights * MASS_UNIT).to(tl.int64)
        is_counted = (columns < A) & counts
        one = tl.full([BLOCK_A], 1, tl.int64)
        tl.atomic_add(use_ptr + ids, mass, mask=is_counted, sem="relaxed")
        tl.atomic_add(use_ptr + BLOCK_E + ids, one, mask=is_counted & stays, sem="relaxed")


@triton.jit(do_not_specialize=["num_tokens"])
def _dim_kernel(
    ids_ptr, weights_ptr, use_ptr, phase_ptr, exact_ptr, levels_ptr, share_ptr, way_row_ptr, united_of_ptr,
    protected_ptr, out_ids_ptr, out_weights_ptr, dimmed_ptr, num_tokens, num_experts, no_expert,
    A: tl.constexpr, BLOCK_A: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Rewrites one chunk of rows. Every program finds the whole step's remap for itself, which saves a launch."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_step = rows < num_tokens
    columns = tl.arange(0, BLOCK_A)
    experts = tl.arange(0, BLOCK_E)
    in_table = experts < num_experts
    at = rows[:, None] * A + columns[None, :]
    inside = in_step[:, None] & (columns < A)[None, :]
    any_level = tl.load(levels_ptr) + tl.load(levels_ptr + 1)
    protected = tl.load(protected_ptr + experts, mask=in_table, other=1) != 0
    row_phase = tl.load(phase_ptr + rows, mask=in_step, other=0)
    exact = tl.load(exact_ptr + rows, mask=in_step, other=1) != 0
    wait_for_inputs(DEPENDENT)
    let_next_start(DEPENDENT)
    ids = tl.load(ids_ptr + at, mask=inside, other=no_expert)
    weights = tl.load(weights_ptr + at, mask=inside, other=0.0)
    if any_level == 0:
        tl.store(out_ids_ptr + at, ids, mask=inside)
        tl.store(out_weights_ptr + at, weights, mask=inside)
        return
    mass = tl.load(use_ptr + experts).to(tl.float32)
    staying = tl.load(use_ptr + BLOCK_E + experts)
    ranks_above = (mass[None, :] > mass[:, None]) | (
        (mass[None, :] == mass[:, None]) & (experts[None, :] < experts[:, None])
    )
    mass_above = tl.sum(tl.where(ranks_above, mass[None, :], 0.0), axis=1)
    may_move = (mass > 0) & (staying == 0) & ~protected

    new_ids = ids
    for phase in range(2):
        level = tl.load(levels_ptr + phase)
        if level > 0:
            cold = may_move & (mass_above >= (1.0 - tl.load(share_ptr + level)) * tl.sum(mass, axis=0))
            united_row = united_of_ptr + tl.load(way_row_ptr + level) * num_experts
            united = tl.load(united_row + experts, mask=in_table, other=-1).to(tl.int32)
            num_cold = tl.sum(((united[None, :] == united[:, None]) & cold[None, :]).to(tl.int32), axis=1)
            remap = tl.where(cold & (num_cold >= 2), united, experts)
            moves = (~exact & (row_phase == phase))[:, None] & (ids < num_experts)
            at_id = tl.reshape(tl.where(moves, ids, 0), [ROWS * BLOCK_A])
            new_ids = tl.where(moves, tl.reshape(tl.gather(remap, at_id, axis=0), [ROWS, BLOCK_A]), new_ids)
    num_dimmed = tl.sum((new_ids != ids).to(tl.int32), axis=1)
    tl.store(dimmed_ptr + rows, tl.load(dimmed_ptr + rows, mask=in_step, other=0) + num_dimmed, mask=in_step)

    same = new_ids[:, :, None] == new_ids[:, None, :]  # [ROWS, BLOCK_A, BLOCK_A]
    is_first = tl.min(tl.where(same, columns[None, None, :], BLOCK_A), axis=2) == columns[None, :]
    spread = tl.broadcast_to(weights[:, None, :], [ROWS, BLOCK_A, BLOCK_A])
    summed = tl.sum(tl.where(same, spread, 0.0), axis=2)
    tl.store(out_ids_ptr + at, tl.where(is_first, new_ids, no_expert), mask=inside)
    tl.store(out_weights_ptr + at, tl.where(is_first, summed, 0.0), mask=inside)
