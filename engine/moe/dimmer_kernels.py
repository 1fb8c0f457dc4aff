"""Triton twin of the dimmer: the gate's kernel counts the experts' use, then one launch rewrites; no host sync.

Legend: T tokens, E original experts, A experts per token, N packed experts, S settings. The rule is that of
engine.moe.dimmer. Sums run in integers or in a fixed order, so the same inputs give the same routing. When neither
phase is dimmed the kernel leaves all as it is, so level 0 costs a launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.batch import RowInfo
from engine.layers.launch import launch_options, let_next_start, wait_for_inputs
from engine.moe.dimmer import Dimmer
from engine.moe.gate import Routing
from engine.moe.settings import DimmerKind

SMALL_STEP_TOKENS = 256
SMALL_CHUNK_ROWS = 16
LARGE_CHUNK_ROWS = 64
MASS_UNIT = tl.constexpr(2.0**30)  # mass is summed in integers: exact in any order
CODED_KINDS = (DimmerKind.UNITED, DimmerKind.PAPER, DimmerKind.PIGGYBACK, DimmerKind.SIMILAR)
KIND_UNITED, KIND_PAPER, KIND_PIGGYBACK, KIND_SIMILAR = (tl.constexpr(int(kind)) for kind in CODED_KINDS)


def rewrite_(dimmer: Dimmer, layer: int, routing: Routing, use: Tensor, rows: RowInfo, dimmed_pairs: Tensor) -> None:
    """Dimmer.rewrite in place; adds each row's dimmed pairs to ``dimmed_pairs`` [T].

    ``routing.probs`` is [T, >= E]; ``use`` [4, >= E] is what count_use has counted over the step.
    """
    assert routing.probs is not None
    num_tokens, num_columns = routing.ids.shape
    num_experts = len(dimmer.identity)
    chunk_rows = SMALL_CHUNK_ROWS if num_tokens <= SMALL_STEP_TOKENS else LARGE_CHUNK_ROWS
    similarity = dimmer.share if dimmer.similarity is None else dimmer.similarity[layer]  # never read without one
    _dim_kernel[(triton.cdiv(num_tokens, chunk_rows),)](
        routing.ids, routing.weights, routing.probs, routing.probs.stride(0), use, use.stride(0),
        rows.phase, rows.exact, rows.valid, rows.levels,
        dimmer.top_k, dimmer.top_k.shape[1], layer, dimmer.protected[layer],
        dimmer.kind, dimmer.way_row, dimmer.budget, dimmer.share, dimmer.min_similarity,
        dimmer.united_of[layer], similarity, dimmed_pairs,
        num_tokens, num_experts, dimmer.num_packed,
        A=num_columns, BLOCK_A=triton.next_power_of_2(num_columns), ROWS=chunk_rows,
        BLOCK_E=triton.next_power_of_2(num_experts), CUTS=dimmer.cuts,
        **{f"HAS_{kind.name}": kind in dimmer.kinds for kind in CODED_KINDS}, num_warps=16,
        **launch_options(routing.ids.device),
    )  # fmt: skip


@triton.jit
def count_use(
    ids, weights, may_dim, top_k, keep, protected_ptr, use_ptr, use_stride, num_experts,
    A: tl.constexpr, BLOCK_A: tl.constexpr, CUTS: tl.constexpr, KEEPS: tl.constexpr,
):  # fmt: skip
    """Adds one row's pairs [BLOCK_A] to ``use``: by expert the mass, the pairs, those of rows that are not dimmed, and,
    if a dimmer asks (KEEPS), those among the best ``keep`` of rows that are. CUTS: after some have been dropped."""
    columns = tl.arange(0, BLOCK_A)
    is_pair = (columns < A) & (ids < num_experts)
    if CUTS:
        protected = tl.load(protected_ptr + ids, mask=is_pair, other=1) != 0
        drops = (columns >= top_k) & may_dim & ~protected
        left = tl.where(drops, 0.0, weights)
        is_cut = tl.sum(drops.to(tl.int32), axis=0) > 0
        weights = tl.where(is_cut, left * (tl.sum(weights, axis=0) / tl.sum(left, axis=0)), weights)
        is_pair = is_pair & ~drops
    one = tl.full([BLOCK_A], 1, tl.int64)
    tl.atomic_add(use_ptr + ids, (weights * MASS_UNIT).to(tl.int64), mask=is_pair, sem="relaxed")
    tl.atomic_add(use_ptr + use_stride + ids, one, mask=is_pair, sem="relaxed")
    tl.atomic_add(use_ptr + 2 * use_stride + ids, one, mask=is_pair & ~may_dim, sem="relaxed")
    if KEEPS:
        tl.atomic_add(use_ptr + 3 * use_stride + ids, one, mask=is_pair & may_dim & (columns < keep), sem="relaxed")


@triton.jit(do_not_specialize=["num_tokens", "layer"])
def _dim_kernel(
    ids_ptr, weights_ptr, probs_ptr, probs_stride, use_ptr, use_stride, phase_ptr, exact_ptr, valid_ptr, levels_ptr,
    top_k_ptr, num_layers, layer, protected_ptr,
    kind_ptr, way_row_ptr, budget_ptr, share_ptr, min_similarity_ptr, united_of_ptr, similarity_ptr,
    dimmed_ptr, num_tokens, num_experts, no_expert,
    A: tl.constexpr, BLOCK_A: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr, CUTS: tl.constexpr,
    HAS_UNITED: tl.constexpr, HAS_PAPER: tl.constexpr, HAS_PIGGYBACK: tl.constexpr, HAS_SIMILAR: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Rewrites one chunk of rows. Every program finds the whole step's remap for itself, which saves a launch.

    What it needs of the settings is read before the wait. Dimmers that no setting names cost no code.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_step = rows < num_tokens
    columns = tl.arange(0, BLOCK_A)
    experts = tl.arange(0, BLOCK_E)
    in_table = experts < num_experts
    at = rows[:, None] * A + columns[None, :]
    inside = in_step[:, None] & (columns < A)[None, :]
    any_level = tl.load(levels_ptr) + tl.load(levels_ptr + 1)
    row_phase = tl.load(phase_ptr + rows, mask=in_step, other=0).to(tl.int32)
    exact = tl.load(exact_ptr + rows, mask=in_step, other=1) != 0
    valid = tl.load(valid_ptr + rows, mask=in_step, other=0) != 0
    protected = tl.load(protected_ptr + experts, mask=in_table, other=0) != 0
    setting_of_row = tl.load(levels_ptr + row_phase)
    may_dim = valid & ~exact & (setting_of_row > 0)
    top_k = tl.load(top_k_ptr + setting_of_row * num_layers + layer)
    phases = tl.arange(0, 2)
    settings = tl.load(levels_ptr + phases)
    share_of = tl.load(share_ptr + settings)
    united_row = united_of_ptr + tl.load(way_row_ptr + settings)[:, None] * num_experts
    united_of = tl.load(united_row + experts[None, :], mask=in_table[None, :], other=-1).to(tl.int32)  # [2, BLOCK_E]
    wait_for_inputs(DEPENDENT)
    let_next_start(DEPENDENT)
    if any_level == 0:
        return
    before = tl.load(ids_ptr + at, mask=inside, other=no_expert)
    weights = tl.load(weights_ptr + at, mask=inside, other=0.0)
    mass = tl.load(use_ptr + experts, mask=in_table, other=0).to(tl.float32)
    count = tl.load(use_ptr + use_stride + experts, mask=in_table, other=0).to(tl.float32)
    is_used = count > 0
    stays = (tl.load(use_ptr + 2 * use_stride + experts, mask=in_table, other=0) > 0) | (protected & is_used)
    if HAS_PIGGYBACK or HAS_SIMILAR:
        is_needed = (tl.load(use_ptr + 3 * use_stride + experts, mask=in_table, other=0) > 0) | stays
    ids = before
    if CUTS:
        is_protected = mapped(protected.to(tl.int32), before, before < num_experts, ROWS, BLOCK_A) != 0
        drops = (columns[None, :] >= top_k[:, None]) & may_dim[:, None] & ~is_protected
        left = tl.where(drops, 0.0, weights)
        is_cut = tl.sum(drops.to(tl.int32), axis=1) > 0
        cut = left * (tl.sum(weights, axis=1) / tl.sum(left, axis=1))[:, None]
        weights = tl.where(is_cut[:, None], cut, weights)
        ids = tl.where(drops, no_expert, before)

    new_ids, new_weights = ids, weights
    for phase in range(2):
        setting = tl.load(levels_ptr + phase)
        rows_here = may_dim & (row_phase == phase)
        kind = tl.where(tl.sum(rows_here.to(tl.int32), axis=0) > 0, tl.load(kind_ptr + setting), 0)
        moves = rows_here[:, None] & (ids < num_experts)
        if HAS_UNITED or HAS_PAPER:  # noqa: SIM102 (decided when compiling)
            if (kind == KIND_UNITED) | (kind == KIND_PAPER):
                share = tl.sum(tl.where(phases == phase, share_of, 0.0), axis=0)
                united = tl.sum(tl.where((phases == phase)[:, None], united_of, 0), axis=0)
                rank = mass
                if HAS_PAPER:
                    rank = tl.where(kind == KIND_PAPER, count, mass)
                is_cold = is_used & ~stays & ~is_hot(rank, 1.0 - share, BLOCK_E)
                num_cold = tl.sum(((united[None, :] == united[:, None]) & is_cold[None, :]).to(tl.int32), axis=1)
                target = tl.where(is_cold & (num_cold >= 2), united, experts)
                new_ids = tl.where(moves, mapped(target, ids, moves, ROWS, BLOCK_A), new_ids)
        if HAS_SIMILAR:  # noqa: SIM102
            if kind == KIND_SIMILAR:
                target = nearest_needed(
                    similarity_ptr, is_needed, tl.load(min_similarity_ptr + setting), num_experts, BLOCK_E
                )
                new_ids = tl.where(moves, mapped(target, ids, moves, ROWS, BLOCK_A), new_ids)
        if HAS_PIGGYBACK:  # noqa: SIM102
            if kind == KIND_PIGGYBACK:
                is_active = is_used & (is_needed | (rank_of(mass, is_needed, BLOCK_E) < tl.load(budget_ptr + setting)))
                probs_at = probs_ptr + rows.to(tl.int64)[:, None] * probs_stride + experts[None, :]
                probs = tl.load(probs_at, mask=rows_here[:, None] & in_table[None, :], other=0.0)
                is_own = tl.sum((ids[:, :, None] == experts[None, None, :]).to(tl.int32), axis=1) > 0  # [ROWS, BLOCK_E]
                leaves = tl.sum((is_own & ~is_active[None, :]).to(tl.int32), axis=1) > 0
                picked, shares = pick(probs, is_own, is_active, ids, num_experts, no_expert, A, BLOCK_A, BLOCK_E)
                scale = tl.sum(weights, axis=1) / tl.sum(shares, axis=1)
                changes = (rows_here & leaves)[:, None]
                new_ids = tl.where(changes, picked, new_ids)
                new_weights = tl.where(changes, shares * scale[:, None], new_weights)

    same = new_ids[:, :, None] == new_ids[:, None, :]  # [ROWS, BLOCK_A, BLOCK_A]
    is_first = tl.min(tl.where(same, columns[None, None, :], BLOCK_A), axis=2) == columns[None, :]
    spread = tl.broadcast_to(new_weights[:, None, :], [ROWS, BLOCK_A, BLOCK_A])
    summed = tl.sum(tl.where(same, spread, 0.0), axis=2)
    is_own_still = tl.max((before[:, :, None] == new_ids[:, None, :]).to(tl.int32), axis=2)
    num_dimmed = tl.sum(tl.where(before < num_experts, 1 - is_own_still, 0), axis=1)
    tl.store(ids_ptr + at, tl.where(is_first, new_ids, no_expert), mask=inside)
    tl.store(weights_ptr + at, tl.where(is_first, summed, 0.0), mask=inside)
    tl.store(dimmed_ptr + rows, tl.load(dimmed_ptr + rows, mask=in_step, other=0) + num_dimmed, mask=in_step)


@triton.jit
def mapped(target, ids, moves, ROWS: tl.constexpr, BLOCK_A: tl.constexpr):
    """target[ids] where ``moves`` [ROWS, BLOCK_A]."""
    at = tl.reshape(tl.where(moves, ids, 0), [ROWS * BLOCK_A])
    return tl.reshape(tl.gather(target, at, axis=0), [ROWS, BLOCK_A])


@triton.jit
def ranks_above(key, BLOCK_E: tl.constexpr):
    """[e, other]: ``other`` has a larger key than ``e``, or the same and a smaller number."""
    experts = tl.arange(0, BLOCK_E)
    is_tie = (key[None, :] == key[:, None]) & (experts[None, :] < experts[:, None])
    return (key[None, :] > key[:, None]) | is_tie


@triton.jit
def is_hot(key, share, BLOCK_E: tl.constexpr):
    """[BLOCK_E] bool: among the highest ranked that hold ``share`` of the keys' sum."""
    above = tl.sum(tl.where(ranks_above(key, BLOCK_E), key[None, :], 0.0), axis=1)
    return above < share * tl.sum(key, axis=0)


@triton.jit
def rank_of(mass, is_needed, BLOCK_E: tl.constexpr):
    """[BLOCK_E]: place of each expert, the needed ones first, then by mass."""
    key = tl.where(is_needed, float("inf"), mass)
    return tl.sum(ranks_above(key, BLOCK_E).to(tl.int32), axis=1)


@triton.jit
def nearest_needed(similarity_ptr, is_needed, min_similarity, num_experts, BLOCK_E: tl.constexpr):
    """[BLOCK_E]: the needed expert most similar to each other one, or itself if none is similar enough."""
    experts = tl.arange(0, BLOCK_E)
    inside = (experts < num_experts)[:, None] & is_needed[None, :]
    at = similarity_ptr + experts[:, None] * num_experts + experts[None, :]
    best, nearest = tl.max(tl.load(at, mask=inside, other=float("-inf")), axis=1, return_indices=True)
    return tl.where(~is_needed & (best >= min_similarity) & (best > float("-inf")), nearest, experts)


@triton.jit
def pick(
    probs, is_own, is_active, ids, num_experts, no_expert,
    A: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """As many active experts as the row had, its own first, then the likeliest: ids and probabilities."""
    columns = tl.arange(0, BLOCK_A)
    experts = tl.arange(0, BLOCK_E)
    score = tl.where(is_active[None, :], probs + is_own.to(tl.float32), -1.0)
    num_pairs = tl.sum((ids < num_experts).to(tl.int32), axis=1)
    picked = tl.zeros_like(ids) + no_expert
    shares = tl.zeros_like(picked).to(tl.float32)
    for column in range(A):
        best, expert = tl.max(score, axis=1, return_indices=True)
        is_best = experts[None, :] == expert[:, None]
        chosen = ((best >= 0) & (column < num_pairs))[:, None] & (columns == column)[None, :]
        picked = tl.where(chosen, expert[:, None], picked)
        shares = tl.where(chosen, tl.sum(tl.where(is_best, probs, 0.0), axis=1)[:, None], shares)
        score = tl.where(is_best, -2.0, score)
    return picked, shares
